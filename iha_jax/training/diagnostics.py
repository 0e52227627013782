"""What head-mixing weights and attention logits are doing, for the metrics of every evaluation.

Shapes: B batch, N tokens, D model width, H heads, S source heads, P pseudo-heads, L IHA layers;
M keys, tokens or virtual tokens.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iha_jax.array_types import Array, Float
from iha_jax.config import Config, ModelConfig
from iha_jax.model import InterleavedHeadAttention, SimplicialAttention, TalkingHeadsAttention, bind
from iha_jax.ops import apply_rope, interleave, mix_heads
from iha_jax.parallel.rules import constrain, shards
from iha_jax.training.optimizer import is_mixing
from iha_jax.training.step import attended_segments

MAX_VIRTUAL_TOKENS = 1024
MAX_SIMPLICIAL_TOKENS = 48


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
    """Means over layers: norm of each head-mixing weight; pseudo-head distance and effective P of each alpha of IHA."""
    found: dict[str, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        name = "/".join(str(entry.key) for entry in path)  # type: ignore[union-attr]
        if not is_mixing(name):
            continue
        kind = name.rsplit("/", 1)[-1]
        layers = leaf if name.startswith("groups/") else leaf[None]
        found.setdefault(f"{kind}_norm", []).append(jnp.linalg.norm(layers.reshape(layers.shape[0], -1), axis=-1))
        if kind.startswith("alpha_"):
            found.setdefault(f"{kind}_distance", []).append(pseudo_head_distance(layers))
            found.setdefault(f"{kind}_effective_p", []).append(effective_pseudo_heads(layers))
    return {name: jnp.mean(jnp.concatenate(values)) for name, values in found.items()}


def largest_logit(config: ModelConfig, parameters: dict[str, Any], inputs: Array, segment_ids: Array | None) -> Array:
    """The largest attention logit, as the softmax gets it, of visible pairs, over all layers, heads and rows given.

    Looks at the first `max(1, 1024 // P)` tokens of each row (simplicial layers: 48), so that the dense scores of one
    layer stay small.
    """
    model = bind(config, parameters)
    tokens = max(1, MAX_VIRTUAL_TOKENS // (config.iha.pseudo_heads if config.uses_iha else 1))
    whole = -(-tokens // shards("N")) * shards("N")  # what divides over the devices is computed, `tokens` are looked at
    inputs = inputs[:, :whole]
    segment_ids = None if segment_ids is None else segment_ids[:, :whole]
    logit_segments = jnp.ones_like(inputs) if segment_ids is None else segment_ids
    logit_segments = jnp.where(jnp.arange(inputs.shape[1]) < tokens, logit_segments, 0)
    table_VD = constrain(model.embedding[...].astype(jnp.dtype(config.compute_dtype)), "V D")
    x_BND = constrain(table_VD[inputs], "B N D")

    def step(carry: tuple[Array, Array], group: tuple[Any, Array]) -> tuple[tuple[Array, Array], None]:
        x_BND, largest = carry
        for i, block in enumerate(group[0].blocks()):
            largest = jnp.maximum(largest, _layer_logit(block, x_BND, logit_segments))
            x_BND = block(x_BND, segment_ids, group[1] + i)
        return (x_BND, largest), None

    carry = (x_BND, jnp.full((), -jnp.inf, jnp.float32))
    first_layers = 1 + len(config.layer_pattern) * jnp.arange(config.num_groups + 1)
    carry, _ = jax.lax.scan(step, carry, (model.groups, first_layers[:-1]))
    if hasattr(model, "remainder"):
        carry, _ = step(carry, (model.remainder, first_layers[-1]))
    return carry[1]


def _layer_logit(block: Any, x_BND: Array, segment_ids: Array) -> Array:
    attention, x_BND = block.attention, block.attention_norm(x_BND)
    if isinstance(attention, SimplicialAttention):
        return _simplicial_logit(attention, x_BND[:, :MAX_SIMPLICIAL_TOKENS], segment_ids[:, :MAX_SIMPLICIAL_TOKENS])
    if isinstance(attention, InterleavedHeadAttention):
        return _interleaved_logit(attention, x_BND, segment_ids)
    q, k, _ = attention.project(x_BND)
    logits = _dots(*attention.rotate(q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)))
    if isinstance(attention, TalkingHeadsAttention):
        logits = jnp.einsum("bhnm,hg->bgnm", logits, attention.logits_mix[...])
    near = _near(np.arange(q.shape[1]), attention.window, attention.config.causal)
    return _largest(logits, near & _together(segment_ids))


def _interleaved_logit(attention: InterleavedHeadAttention, x_BND: Array, segment_ids: Array) -> Array:
    config, iha = attention.config, attention.config.iha
    q, k, _ = attention.project(x_BND)
    q = interleave(mix_heads(q, attention.alpha_query[...].astype(q.dtype)))
    k = interleave(mix_heads(k, attention.alpha_key[...].astype(k.dtype)))
    virtual = np.arange(q.shape[1])
    token = virtual // iha.pseudo_heads
    if "none" not in (config.positions, iha.rope_positions):
        where = token if iha.rope_positions == "token" else virtual
        q, k = (apply_rope(x, theta=config.rope_theta, positions=where) for x in (q, k))
    position, unit = (token, 1) if iha.causality == "token" else (virtual, iha.pseudo_heads)
    near = _near(position, None if attention.window is None else attention.window * unit, config.causal)
    return _largest(_dots(q, k), near & _together(segment_ids[:, token]))


def _simplicial_logit(attention: SimplicialAttention, x_BND: Array, segment_ids: Array) -> Array:
    (q, k, _), (k2, _) = attention.project(x_BND), attention.project_second(x_BND)
    k, k2 = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, k2))
    logits = jnp.einsum("bihd,bjhd,bkhd->bhijk", q / math.sqrt(q.shape[-1]), k, k2).astype(jnp.float32)
    seen, seen2 = (
        _near(np.arange(q.shape[1]), w, attention.config.causal) & _together(segment_ids)
        for w in attention.windows or (None, None)
    )
    return _largest(logits, seen[..., None] & seen2[..., None, :])


def _dots(q: Array, k: Array) -> Array:
    return jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])


def _near(positions: np.ndarray, reach: int | None, causal: bool) -> Array:
    """[N, N]: which positions are not later (if causal) and nearer than `reach` (if there is one)."""
    distance = positions[:, None] - positions[None]
    return jnp.asarray((np.abs(distance) < (reach or np.inf)) & ((distance >= 0) | (not causal)))


def _together(segment_ids: Array) -> Array:
    return (segment_ids[:, :, None] == segment_ids[:, None]) & (segment_ids[:, :, None] > 0)


def _largest(logits_BH: Array, visible_B: Array) -> Array:
    return jnp.max(jnp.where(visible_B[:, None], logits_BH, -jnp.inf))


def make_diagnostics(config: Config) -> Any:
    """Returns a jitted `f(parameters, inputs, segment_ids) -> dict of scalars`, for a few validation rows."""

    @functools.partial(jax.jit)
    def diagnostics(parameters: dict[str, Any], inputs: Array, segment_ids: Array) -> dict[str, Array]:
        values = mixing_diagnostics(parameters)
        segments = attended_segments(config, segment_ids)
        return values | {"largest_attention_logit": largest_logit(config.model, parameters, inputs, segments)}

    return diagnostics
