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

    def of_size(self, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels [n_m, m^2] of the examples with this m, without padding."""
        rows = self.segment_ids.sum(1, dtype=np.int32) == m * m
        return self.tokens[rows, : m * m], self.labels[rows, : m * m]


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

    Every split has equally many examples (to one) of each m from `sizes[0]` to `sizes[1]`, in random order, and each
    entry of R is 1 with probability `density`. No relation occurs twice, in one split or in two: one that was drawn
    before is drawn again, with the same m. Then they are dealt out at random, so the splits have the same distribution.
    Relations that differ in the names of their elements alone (permuted rows and columns) count as different.

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
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for i, m in enumerate(range(low, high + 1)):
        shares = [(count + high - low - i) // (high - low + 1) for count in counts]
        relations = _distinct_relations(generator, sum(shares), m, density)
        dealt = np.split(relations[generator.permutation(len(relations))], np.cumsum(shares)[:-1])
        for split, share in zip(SPLITS, dealt, strict=True):
            columns = (share, compose(share, hops), np.ones_like(share))
            padded = np.zeros((len(share), len(columns), high * high), np.int8)
            padded[..., : m * m] = np.stack(columns, axis=1).reshape(len(share), len(columns), m * m)
            parts[split].append(padded)
    shuffled = {split: generator.permutation(np.concatenate(part)) for split, part in parts.items()}
    return {split: Examples(*np.moveaxis(rows, 1, 0)) for split, rows in shuffled.items()}


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
