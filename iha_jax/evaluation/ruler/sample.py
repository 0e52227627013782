"""A sample, and what a generator of samples is: a text that grows by units of haystack."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from iha_jax.evaluation.ruler.material import Material


@dataclass(frozen=True)
class Sample:
    """The question around its context, how the answer begins, and what the answer should contain."""

    question: str
    answer_prefix: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return self.question + self.answer_prefix


@dataclass(frozen=True)
class Growing:
    """`at(n)` is the sample with n units of haystack, `n >= minimum`; the same n gives the same sample."""

    minimum: int
    at: Callable[[int], Sample]


@dataclass(frozen=True)
class Draw:
    """What a sample is drawn from; randomness is by the first four, lengths are by `count` (tokens of a text)."""

    name: str  # of the subtask
    length: int
    index: int
    seed: int
    count: Callable[[str], int]
    material: Material

    def generator(self, purpose: str) -> random.Random:
        """Its own stream for each purpose, so that a larger haystack changes nothing else of a sample."""
        return random.Random(f"{self.seed}/{self.name}/{self.length}/{self.index}/{purpose}")
