"""Polynomial filters to be learned: from `[X, I]` to `[X, A X, ..., A^{k-1} X]` by one layer of linear attention."""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array
from iha_jax.learned_tasks.experiment import IHA, MHA, SPLITS, Examples, ExperimentConfig, at_least
from iha_jax.learned_tasks.layer import Layer
from iha_jax.theory.polynomial_filters import check_filters, example_matrices, iha_heads, mha_heads_needed, powers

TOLERANCE = 0.01  # of a filter's variance: an R^2 above 0.99
MATRICES = ("orthogonal", "symmetric", "not normal", "cyclic shift")  # of the theory's statements


@dataclass(frozen=True, kw_only=True)
class FiltersExperiment(ExperimentConfig):
    """A is fixed, X is N(0, 1). An entry is one filter `A^i X` of one X: its error is
    `||out - A^i X||^2 / E ||A^i X||^2`, with `E ||A^i X||^2 = r ||A^i||_F^2`, and it is right below `TOLERANCE`."""

    filters: int  # k
    signals: int = at_least(1)
    matrix: str = field(metadata={"choices": MATRICES})

    @property
    def width(self) -> int:
        return self.signals

    @property
    def operator(self) -> np.ndarray:
        return example_matrices(self.tokens)[self.matrix]

    def check(self) -> None:
        """Raises PolynomialFilterError."""
        check_filters(self.operator, self.filters)

    def layer(self, mechanism: str, H: int) -> Layer:
        return Layer(
            interleaved=mechanism == IHA,
            heads=H,
            width=self.tokens + self.signals,
            key_width=self.tokens,
            value_width=self.value_width(mechanism, H),
            outputs=self.filters * self.signals,
            softmax=False,
        )

    def examples(self) -> dict[str, Examples]:
        generator, A = np.random.default_rng(self.data_seed), powers(self.operator, range(self.filters))
        signals = [generator.normal(size=(n, self.tokens, self.signals)) for n in self.split_sizes]
        labels = [np.einsum("kij,njr->nikr", A, X) for X in signals]
        pairs = zip(SPLITS, signals, labels, strict=True)
        return {split: Examples(X.astype(np.float32), y.astype(np.float32)) for split, X, y in pairs}

    def measure(self, outputs: Array, labels: Array) -> tuple[Array, Array]:
        """Outputs [b, N, k r], labels [b, N, k, r]; E = k."""
        variance = (powers(self.operator, range(self.filters)) ** 2).sum((1, 2)) / self.tokens
        errors = ((outputs.reshape(labels.shape) - labels) ** 2).mean((1, 3)) / jnp.asarray(variance, jnp.float32)
        return errors, errors < TOLERANCE

    def heads_by_theorem(self) -> dict[str, int]:
        return {MHA: mha_heads_needed(self.operator, self.filters), IHA: iha_heads(self.filters)}

    def blind_bounds(self) -> np.ndarray:
        """The highest mean R^2 of 1, 2, ..., k attention matrices that are blind to X, with values that read X alone.

        H heads of MHA have H such matrices, of IHA H^2. By Eckart and Young, of the k powers as vectors of norm 1 they
        keep the share of the largest squared singular values.
        """
        found = powers(self.operator, range(self.filters)).reshape(self.filters, -1)
        singular = np.linalg.svd(found / np.linalg.norm(found, axis=1, keepdims=True), compute_uv=False)
        return np.cumsum(singular**2) / self.filters

    def describe(self) -> str:
        bounds = ", ".join(f"{bound:.3f}" for bound in self.blind_bounds())
        return (
            f"k = {self.filters} filters `A^i X`, A {self.matrix} [{self.tokens}, {self.tokens}], X N(0, 1) "
            f"[{self.tokens}, {self.signals}]. Right: a filter of one X with an error below {TOLERANCE:g} of its "
            f"variance. Linear attention, then a linear map of the concatenated heads; queries and keys are "
            f"{self.tokens} wide whatever the heads, values r = {self.signals} (mha) or r H (iha). "
            f"Attention matrices that are blind to X, with values that read X alone, reach an R² of at most {bounds} "
            f"where they are 1 to {self.filters} (H of MHA, H² of IHA)."
        )
