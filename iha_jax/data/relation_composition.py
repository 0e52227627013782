"""Relation composition as sequence labelling (IHA paper, appendix D): which pairs are two, or three, steps apart.

An example is a random boolean `m x m` matrix R, row by row as `m^2` tokens 0 and 1; its labels are all entries of R∘R
(two hops) or R∘R∘R (three), where `(R∘S)[i, k] = or_j R[i, j] and S[j, k]`. Shapes: n examples, L places, `m^2` of the
largest m; shorter examples are padded on the right.
"""

from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Examples:
    """One split. Padding is 0 everywhere, and `segment_ids` says where it is."""

    tokens: np.ndarray  # int8 [n, L]: R
    labels: np.ndarray  # int8 [n, L]: the composition
    segment_ids: np.ndarray  # int8 [n, L]: 1 for entries, 0 for padding


def compose(relations: np.ndarray, hops: int) -> np.ndarray:
    """`R∘...∘R` with `hops` factors, of relations [n, m, m]; boolean."""
    relations = relations.astype(bool)
    composed = relations
    for _ in range(hops - 1):
        composed = np.matmul(composed.astype(np.int32), relations.astype(np.int32)) > 0
    return composed


def make_examples(
    *, hops: int, sizes: tuple[int, int], density: float, counts: tuple[int, int, int], seed: int
) -> dict[str, Examples]:
    """The three `SPLITS`, of `counts` examples; a function of its arguments alone.

    m is uniform over `sizes[0]` to `sizes[1]`, and each entry of R is 1 with probability `density`. No relation occurs
    twice, in one split or in two: one that was drawn before is drawn again, with the same m. The splits are cut from
    one shuffled list, so they have the same distribution. Relations that differ in the names of their elements alone
    (permuted rows and columns) count as different.

    Raises:
      ValueError: for values that make no such data, among them more examples of a size than a quarter of its `2^(m^2)`
        relations, where drawing anew would bend the distribution.
    """
    low, high = sizes
    if hops < 2 or not 1 <= low <= high or not 0 < density < 1 or min(counts) < 1 or seed < 0:
        raise ValueError(
            f"hops = {hops}, sizes = {sizes}, density = {density}, counts = {counts}, seed = {seed}: expected at least "
            f"2 hops, 1 <= smallest <= largest size, 0 < density < 1, at least 1 example a split, a seed of 0 or more"
        )
    generator = np.random.default_rng([seed, hops, low, high])
    of_size = np.bincount(generator.integers(low, high + 1, sum(counts)), minlength=high + 1)
    tokens, labels, segment_ids = (np.zeros((sum(counts), high * high), np.int8) for _ in range(3))
    start = 0
    for m in range(low, high + 1):
        rows = slice(start, start + int(of_size[m]))
        relations = _distinct_relations(generator, int(of_size[m]), m, density)
        tokens[rows, : m * m] = relations.reshape(-1, m * m)
        labels[rows, : m * m] = compose(relations, hops).reshape(-1, m * m)
        segment_ids[rows, : m * m] = 1
        start = rows.stop
    order = np.split(generator.permutation(sum(counts)), np.cumsum(counts)[:-1])
    return {s: Examples(tokens[at], labels[at], segment_ids[at]) for s, at in zip(SPLITS, order, strict=True)}


def _distinct_relations(generator: np.random.Generator, count: int, m: int, density: float) -> np.ndarray:
    """[count, m, m] of bool, no two alike, in the order drawn."""
    if m * m < 40 and count > 2 ** (m * m) // 4:
        raise ValueError(
            f"m = {m}: {count} examples asked for, but there are only 2^{m * m} relations, and no more than a quarter "
            f"of them can be drawn without repetition; ask for fewer examples, or for larger m"
        )
    found: dict[bytes, np.ndarray] = {}
    while len(found) < count:
        for relation in generator.random((count, m, m)) < density:
            if len(found) < count:
                found.setdefault(relation.tobytes(), relation)
    return np.stack(list(found.values())) if found else np.zeros((0, m, m), bool)
