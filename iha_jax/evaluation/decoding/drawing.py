"""How the next token is chosen: temperature, then top-k, then top-p, then one draw whose key is the sample's own.

A key depends on (seed, prompt number, sample number, number of the token in its sample) alone: not on what else is in
the batch. Shapes: B batch, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from iha_jax.array_types import Array, Float, Int
from iha_jax.evaluation.text_model import Sampling


@dataclass(frozen=True)
class Drawing:
    """The part of `Sampling` that programs are compiled for."""

    temperature: float
    top_k: int
    top_p: float
    vocab_size: int  # the tokenizer's: ids that a model has beyond it stand for nothing

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int) -> "Drawing":
        """Raises ValueError, naming the field, for values outside their range."""
        if not sampling.temperature >= 0:
            raise ValueError(f"temperature = {sampling.temperature}: expected 0 (the likeliest token) or more")
        if sampling.top_k < 0:
            raise ValueError(f"top_k = {sampling.top_k}: expected 0 (all tokens) or more")
        if not 0 < sampling.top_p <= 1:
            raise ValueError(f"top_p = {sampling.top_p}: expected a number above 0, at most 1 (all tokens)")
        return cls(float(sampling.temperature), sampling.top_k, float(sampling.top_p), vocab_size)


def keys(
    seed: Int[Array, ""], prompts_B: Int[Array, "B"], samples_B: Int[Array, "B"], drawn_B: Int[Array, "B"]
) -> Array:
    """One random key a row, of this prompt, sample of it and token of that sample."""

    def one(prompt: Array, sample: Array, drawn: Array) -> Array:
        key = jax.random.key(seed)
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, prompt), sample), drawn)

    return jax.vmap(one)(prompts_B, samples_B, drawn_B)


def candidates(logits_BV: Float[Array, "B V"], drawing: Drawing) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
    """Log-weights and ids of the tokens that can be drawn, likeliest first (of equals, the lower id); -inf: cannot.

    `logits / temperature`, of which the `top_k` largest, of which the fewest whose probabilities (softmax over those
    left by top-k) reach `top_p`: a token stays when those before it do not reach it. The likeliest always stays.
    """
    V = logits_BV.shape[-1]
    values, ids = jax.lax.top_k(logits_BV / drawing.temperature, min(drawing.top_k or V, V))
    if drawing.top_p < 1:
        probabilities = jax.nn.softmax(values)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        stays = (before < drawing.top_p).at[:, 0].set(True)
        values = jnp.where(stays, values, -jnp.inf)
    return values, ids


def draw(logits_BV: Float[Array, "B V"], keys_B: Array, drawing: Drawing) -> Int[Array, "B"]:
    """The next token of each row; with temperature 0 the likeliest (of equals, the lower id)."""
    logits_BV = logits_BV[:, : drawing.vocab_size]
    if drawing.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    if drawing.top_k == 0 and drawing.top_p == 1:  # no need to sort
        return jax.vmap(jax.random.categorical)(keys_B, logits_BV / drawing.temperature)
    values_BC, ids_BC = candidates(logits_BV, drawing)
    chosen_B = jax.vmap(jax.random.categorical)(keys_B, values_BC)
    return jnp.take_along_axis(ids_BC, chosen_B[:, None], axis=-1)[:, 0]
