"""CPM-3 to be learned: from `[x, I]` to the counts of matching pairs, by one layer of softmax attention and an MLP.

The count is regressed, as the construction's MLP computes it: counts are ordered, and there are up to N^2 + 1 of them.

*What the task asks of a model.* The count at i is `sum_{a, b: x_i + G a + b = 0 (mod M)} n_a n_b`, n_a being the number
of tokens a. It depends on x_i and on how often each token occurs, not on their order: the cyclic shifts of the
constructions are sufficient, not necessary. With values that hold the one-hot code of a token, one head is enough that
attends to all tokens alike but to its own more. Here a token is the number x_i, as in the theorem, and values are
linear in `[x, I]`.
"""

from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array
from iha_jax.learned_tasks.experiment import IHA, MHA, SPLITS, Examples, ExperimentConfig, at_least
from iha_jax.learned_tasks.layer import GivenShifts, Layer
from iha_jax.theory.cpm3 import Task, brute_force, iha_heads

SHIFTS = "shifts_given"
MOST = 2**63
CHUNK = 512  # sequences whose pairs are held at once


@dataclass(frozen=True, kw_only=True)
class CPM3Experiment(ExperimentConfig):
    """Sequences of N = N_max tokens, none in two splits (rotations of one may be). An entry is a position; its error is
    the squared error over the variance of the training counts, and it is right where the rounded output is the count.
    """

    modulus: int  # M
    factor: int  # G
    mlp_width: int = at_least(1)

    @property
    def counts(self) -> bool:
        return True

    @cached_property
    def cpm3(self) -> Task:
        return Task(self.modulus, self.factor, self.tokens)

    def check(self) -> None:
        """Raises CPM3Error; ValueError for more examples than sequences, or more sequences than are numbered."""
        sequences, wanted = self.cpm3.M**self.tokens, sum(self.split_sizes)
        if wanted > sequences:
            raise ValueError(
                f"{wanted} examples asked for, but there are only {self.modulus}^{self.tokens} = {sequences} "
                f"sequences; ask for fewer examples, or for more tokens"
            )
        if sequences >= MOST:
            raise ValueError(f"{self.modulus}^{self.tokens} sequences; expected fewer than 2^63: ask for fewer tokens")

    @property
    def arms(self) -> list[tuple[str, int]]:
        """With the MLP alone at the end, which says how much of the task is attention's."""
        return [*super().arms, (SHIFTS, 0)]

    def layer(self, mechanism: str, H: int) -> Layer | GivenShifts:
        if mechanism == SHIFTS:
            return GivenShifts(self.tokens, self.mlp_width)
        return Layer(
            interleaved=mechanism == IHA,
            heads=H,
            width=self.tokens + 1,
            key_width=self.tokens,
            value_width=self.value_width(mechanism, H),
            outputs=1,
            softmax=True,
            mlp_width=self.mlp_width,
        )

    @cached_property
    def _examples(self) -> dict[str, Examples]:
        N, M = self.tokens, self.modulus
        drawn = np.random.default_rng(self.data_seed).choice(M**N, sum(self.split_sizes), replace=False)
        sequences = drawn[:, None] // M ** np.arange(N) % M
        parts = np.array_split(sequences, range(CHUNK, len(sequences), CHUNK))
        labels = np.concatenate([brute_force(self.cpm3, part) for part in parts]).astype(np.float32)
        cuts = np.cumsum(self.split_sizes)[:-1]
        pairs = zip(SPLITS, np.split(sequences, cuts), np.split(labels, cuts), strict=True)
        return {split: Examples(x[..., None].astype(np.float32), y) for split, x, y in pairs}

    def examples(self) -> dict[str, Examples]:
        return self._examples

    @cached_property
    def variance(self) -> float:
        """Of the training counts; 1 where all are alike."""
        return float(self._examples["train"].labels.var()) or 1.0

    def measure(self, outputs: Array, labels: Array) -> tuple[Array, Array]:
        """Outputs [b, N, 1], labels [b, N]; E = N."""
        errors = outputs[..., 0] - labels
        return errors**2 / self.variance, jnp.abs(errors) < 0.5

    def heads_by_theorem(self) -> dict[str, int]:
        return {MHA: self.tokens, IHA: iha_heads(self.tokens)}

    def describe(self) -> str:
        return (
            f"CPM-3 modulo M = {self.modulus}, G = {self.factor}, sequences of N = {self.tokens} tokens, "
            f"{self.train_examples} / {self.validation_examples} / {self.test_examples} examples, none in two splits. "
            f"Right: a position where the rounded output is the count. Softmax attention, then an MLP of width "
            f"{self.mlp_width}; queries and keys are {self.tokens} wide whatever the heads, values 1 (mha) or H (iha). "
            f"{SHIFTS}: the MLP alone, given all cyclic shifts that attention would have to find."
        )
