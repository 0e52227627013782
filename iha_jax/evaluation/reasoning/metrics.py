"""pass@k, P@1 and majority votes, with intervals over problems."""

import math
from collections.abc import Hashable, Mapping, Sequence

from iha_jax.evaluation.tasks import mean_interval

KS = (1, 5, 10, 16)


def pass_at_k(n: int, c: int, k: int) -> float:
    """`1 - C(n - c, k) / C(n, k)`: the chance that k of n samples, drawn without replacement, hold one of the c right.

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374). Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} right samples in {n}: expected 0 <= right <= samples and 1 <= k <= samples")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(votes: Sequence[Hashable | None]) -> Hashable | None:
    """The answer with most votes; of several the one that had that many first, reading the samples in order.

    None is no vote. None is returned when nobody votes.
    """
    counts: dict[Hashable, int] = {}
    best, most = None, 0
    for vote in votes:
        if vote is None:
            continue
        counts[vote] = counts.get(vote, 0) + 1
        if counts[vote] > most:
            best, most = vote, counts[vote]
    return best


def ks_up_to(samples: int) -> list[int]:
    return [k for k in KS if k <= samples]


def pass_metrics(correct: Sequence[Sequence[bool]], suffix: str = "") -> dict[str, list[float]]:
    """Values of each problem by metric, from correct[problem][sample]: `p@k`, k of 1, 5, 10, 16 up to the samples.

    `p@1` is the mean over samples. Of one greedy sample it is exact match.
    """
    n = len(correct[0])
    return {f"p@{k}{suffix}": [pass_at_k(n, sum(row), k) for row in correct] for k in ks_up_to(n)}


def vote_metrics(
    votes: Sequence[Sequence[Hashable | None]], gold: Sequence[Hashable], suffix: str = ""
) -> dict[str, list[float]]:
    """Values of each problem by metric: `maj@k`, whether the majority of the first k samples is the right answer."""
    result = {}
    for k in ks_up_to(len(votes[0])):
        if k > 1:
            result[f"maj@{k}{suffix}"] = [
                float(majority(row[:k]) == answer) for row, answer in zip(votes, gold, strict=True)
            ]
    return result


def summarize(
    values: Mapping[str, Sequence[float]],
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Means over problems and their 95 % intervals, from the values of each problem."""
    means = {name: math.fsum(found) / len(found) for name, found in values.items()}
    return means, {name: mean_interval(found) for name, found in values.items()}
