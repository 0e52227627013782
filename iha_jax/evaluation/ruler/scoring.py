"""RULER's metric: which of the expected answers an output contains."""

import math
import re
from collections.abc import Mapping, Sequence

CONTROL = re.compile(r"[\x00-\x1f]")


def string_match(output: str, answers: Sequence[str], any_answer: bool) -> float:
    """The fraction of `answers` that occur in `output`, whatever their case; of `any_answer`, 1 if one does, else 0.

    Control characters count as line breaks, and space around the output does not count, as published.
    """
    text = CONTROL.sub("\n", output.strip()).strip().lower()
    found = [answer.lower() in text for answer in answers]
    return float(any(found)) if any_answer else sum(found) / len(found)


def average_interval(means: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """95 % interval of the plain average of k independent means from their own intervals.

    `average - sqrt(sum (mean - low)^2) / k`, and so above: distances of independent parts add as squares ("square and
    add"), which keeps the sides of one-sided intervals apart. NaN where one of them is.
    """
    k = len(means)
    average = math.fsum(means.values()) / k
    below = math.hypot(*(means[name] - intervals[name][0] for name in means)) / k
    above = math.hypot(*(intervals[name][1] - means[name] for name in means)) / k
    return average - below, average + above
