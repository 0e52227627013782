"""What a checked statement is: a claim, and a function that says whether it holds and what was measured."""

from collections.abc import Callable
from typing import NamedTuple

import jax


class Outcome(NamedTuple):
    """Whether a statement holds, and the figures that say so."""

    holds: bool
    evidence: str


class Statement(NamedTuple):
    """A claim and its check, which computes in float64."""

    claim: str
    check: Callable[[], Outcome]

    def outcome(self) -> Outcome:
        """What the check found. An exception is a statement that does not hold, with its text as the evidence."""
        try:
            with jax.enable_x64(True):
                return self.check()
        except Exception as error:
            return Outcome(False, f"{type(error).__name__}: {error}")
