"""A stand-in for the signal that ends an experiment."""


class StopAfter:
    """A preemption that comes after some epochs; -1: never."""

    def __init__(self, epochs):
        self.epochs = epochs

    def requested(self, step):
        return step == self.epochs
