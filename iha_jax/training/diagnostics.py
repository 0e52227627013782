"""What IHA's mixing weights and the attention logits are doing, for the metrics of every evaluation.

Shapes: B batch, N tokens, D model width, H heads, S source heads, P pseudo-heads, L IHA layers.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array, Float
from iha_jax.config import Config, ModelConfig
from iha_jax.model import InterleavedHeadAttention, bind
from iha_jax.ops import apply_rope, interleave, mix_heads
from iha_jax.training.optimizer import is_mixing
from iha_jax.training.step import attended_segments

MAX_VIRTUAL_TOKENS = 1024


def pseudo_head_distance(alpha: Float[Array, "... S H P"]) -> Float[Array, "..."]:
    """Mean over heads and pairs p != p' of `|alpha[:, h, p] - alpha[:, h, p']| / rms_p |alpha[:, h, p]|`.

    0: all pseudo-heads of a head are the same; sqrt(2): orthogonal and of equal norm. 0 for P = 1.
    """
    rows = jnp.moveaxis(alpha, -3, -1)  # [..., H, P, S]
    pseudo_heads = rows.shape[-2]
    if pseudo_heads == 1:
        return jnp.zeros(alpha.shape[:-3])
    difference = jnp.linalg.norm(rows[..., :, None, :] - rows[..., None, :, :], axis=-1)
    scale = jnp.sqrt(jnp.mean(jnp.sum(rows**2, axis=-1), axis=-1))
    mean_pair = difference.sum((-1, -2)) / (pseudo_heads * (pseudo_heads - 1))
    return jnp.mean(mean_pair / jnp.maximum(scale, 1e-30), axis=-1)


def effective_pseudo_heads(alpha: Float[Array, "... S H P"]) -> Float[Array, "..."]:
    """Mean over heads of the participation ratio `(sum s_i^2)^2 / sum s_i^4`, `s` the singular values of [P, S].

    1 when all pseudo-heads of a head are multiples of one another, min(P, S) when orthogonal and of equal norm.
    """
    rows = jnp.moveaxis(alpha, -3, -1)
    gram = jnp.einsum("...ps,...qs->...pq", rows, rows)
    trace = jnp.trace(gram, axis1=-2, axis2=-1)
    return jnp.mean(trace**2 / jnp.maximum(jnp.sum(gram**2, axis=(-1, -2)), 1e-30), axis=-1)


def mixing_diagnostics(parameters: dict[str, Any]) -> dict[str, Array]:
    """Means over all IHA layers: pseudo-head distance, effective P and norm of each alpha, norm of the collapse."""
    found: dict[str, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        name = "/".join(str(entry.key) for entry in path)  # type: ignore[union-attr]
        if not is_mixing(name):
            continue
        kind = name.rsplit("/", 1)[-1]
        layers = leaf if name.startswith("groups/") else leaf[None]
        found.setdefault(f"{kind}_norm", []).append(jnp.linalg.norm(layers.reshape(layers.shape[0], -1), axis=-1))
        if kind != "collapse":
            found.setdefault(f"{kind}_distance", []).append(pseudo_head_distance(layers))
            found.setdefault(f"{kind}_effective_p", []).append(effective_pseudo_heads(layers))
    return {name: jnp.mean(jnp.concatenate(values)) for name, values in found.items()}


def largest_logit(config: ModelConfig, parameters: dict[str, Any], inputs: Array, segment_ids: Array | None) -> Array:
    """The largest attention logit `<q, k> / sqrt(d)` of visible pairs, over all layers, heads and rows given.

    Looks at the first `max(1, 1024 // P)` tokens of each row, so that the dense scores of one layer stay small.
    """
    model = bind(config, parameters)
    tokens = max(1, MAX_VIRTUAL_TOKENS // (config.iha.pseudo_heads if config.uses_iha else 1))
    inputs = inputs[:, :tokens]
    segment_ids = None if segment_ids is None else segment_ids[:, :tokens]
    x_BND = model.embedding[...].astype(jnp.dtype(config.compute_dtype))[inputs]

    def step(carry: tuple[Array, Array], group: Any) -> tuple[tuple[Array, Array], None]:
        x_BND, largest = carry
        for block in group.blocks():
            largest = jnp.maximum(largest, _layer_logit(block, x_BND, segment_ids))
            x_BND = block(x_BND, segment_ids)
        return (x_BND, largest), None

    carry = (x_BND, jnp.full((), -jnp.inf, jnp.float32))
    carry, _ = jax.lax.scan(step, carry, model.groups)
    if hasattr(model, "remainder"):
        carry, _ = step(carry, model.remainder)
    return carry[1]


def _layer_logit(block: Any, x_BND: Array, segment_ids: Array | None) -> Array:
    attention, config = block.attention, block.attention.config
    q, k, _ = attention.project(block.attention_norm(x_BND))
    pseudo_heads, positions, token_causal = 1, "token", True
    if isinstance(attention, InterleavedHeadAttention):
        pseudo_heads, positions = config.iha.pseudo_heads, config.iha.rope_positions
        token_causal = config.iha.causality == "token"
        q = interleave(mix_heads(q, attention.alpha_query[...].astype(q.dtype)))
        k = interleave(mix_heads(k, attention.alpha_key[...].astype(k.dtype)))
    else:
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    virtual = np.arange(q.shape[1])
    token = virtual // pseudo_heads
    if positions != "none":
        where = token if positions == "token" else virtual
        q, k = (apply_rope(x, theta=config.rope_theta, positions=where) for x in (q, k))
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    position, unit = (token, 1) if token_causal else (virtual, pseudo_heads)
    distance = position[:, None] - position[None]
    visible = (distance >= 0) & (distance < (attention.window or q.shape[1]) * unit)
    if segment_ids is not None:
        segment = segment_ids[:, token]
        same = (segment[:, :, None] == segment[:, None]) & (segment[:, :, None] > 0)
        visible = visible & same[:, None]
    return jnp.max(jnp.where(visible, logits, -jnp.inf))


def make_diagnostics(config: Config) -> Any:
    """Returns a jitted `f(parameters, inputs, segment_ids) -> dict of scalars`, for a few validation rows."""

    @functools.partial(jax.jit)
    def diagnostics(parameters: dict[str, Any], inputs: Array, segment_ids: Array) -> dict[str, Array]:
        values = mixing_diagnostics(parameters)
        segments = attended_segments(config, segment_ids)
        return values | {"largest_attention_logit": largest_logit(config.model, parameters, inputs, segments)}

    return diagnostics
