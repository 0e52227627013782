"""What a model's layers execute, by the implementations that its config names."""

import dataclasses

import jax
import jax.numpy as jnp

from iha_jax.accounting import Flops, check_kind, flops_per_token
from iha_jax.config import IHA_KINDS, SIMPLICIAL_KINDS, ModelConfig
from iha_jax.executed.kernels import cudnn_work, splash_work
from iha_jax.executed.xla import (
    Work,
    blockwise_work,
    reference_work,
    simplicial_work,
    streaming_work,
    talking_heads_work,
)
from iha_jax.ops import (
    Features,
    resolve_attention_implementation,
    resolve_blocked_implementation,
    resolve_interleaved_implementation,
)
from iha_jax.ops.implementations import current_platform
from iha_jax.ops.streaming import Geometry


def layer_work(
    model: ModelConfig, kind: str, *, batch_size: int = 1, training: bool = False, segments: bool = True
) -> Work:
    """What the implementation that `model` names for layers of `kind` ("auto" resolved for this platform; `segments`:
    whether documents are packed, which decides what can run) computes for a row.

    Raises:
      ValueError: for a layer kind without a closed form, for training through a reference, which nobody should, and for
        an implementation that cannot run the layer here.
    """
    check_kind(kind)
    N, windows = model.context_length, (model.simplicial.window, model.simplicial.second_window)
    window = {"mha_local": model.window, "iha_local": model.iha.window, "simplicial_local": windows[0]}.get(kind)
    features = Features(
        dtype=model.compute_dtype,
        tokens=N,
        head_width=model.head_width,
        value_width=model.head_width * (2 if kind == "differential" else 1),
        causal=model.causal,
        window=None if window is None or window >= N else window,
        segments=segments,
    )
    if kind in IHA_KINDS:
        name = resolve_interleaved_implementation(model.iha.implementation, features)
    elif kind in SIMPLICIAL_KINDS or kind == "talking_heads":  # as the model names it: block-wise, or the reference
        name = "reference" if model.implementation == "reference" else resolve_blocked_implementation("auto", features)
    else:
        name = resolve_attention_implementation(model.implementation, features)
    if name == "reference":
        if training:
            raise ValueError(f"layer kind {kind!r} through implementation 'reference': no closed form in training")
        return _reference(model, kind)
    if kind in IHA_KINDS:
        return _interleaved(model, name, features.window, batch_size, training)
    options = {"causal": model.causal, "training": training}
    if kind == "talking_heads":
        return talking_heads_work(N, None, heads=model.num_heads, batch=batch_size, **options)
    if kind in SIMPLICIAL_KINDS:
        pair = windows if kind == "simplicial_local" else None
        return simplicial_work(N, pair, heads=model.num_heads, batch=batch_size, **options)
    work = {"blockwise": blockwise_work, "splash": splash_work, "cudnn": cudnn_work}[name](
        N, features.window, **options
    )
    if kind == "differential":  # values of width 2d; cuDNN takes them in two calls, each with the scores
        scores = 2 if name == "cudnn" else 1
        return dataclasses.replace(work, scores=scores * work.scores, sums=2 * work.sums)
    return work


def _reference(model: ModelConfig, kind: str) -> Work:
    N = model.context_length
    work = reference_work(N, model.iha.pseudo_heads if kind in IHA_KINDS else None)
    if kind in SIMPLICIAL_KINDS:
        return Work(float(N**3), float(N**3))
    if kind == "differential":
        return dataclasses.replace(work, sums=2 * work.sums)
    return dataclasses.replace(work, exchanged=2 * work.scores) if kind == "talking_heads" else work


def _interleaved(model: ModelConfig, name: str, window: int | None, batch: int, training: bool) -> Work:
    iha, N, H, d = model.iha, model.context_length, model.num_heads, model.head_width
    if name == "streaming":
        space = Geometry(N, iha.pseudo_heads, window, model.causal, iha.causality, None, "token")
        return streaming_work(space, heads=H, batch=batch, training=training)
    from iha_jax.executed import fused  # imported here: Pallas takes a second

    dtype = jnp.dtype(model.compute_dtype)
    q, k = (jax.ShapeDtypeStruct((batch, N, heads, d), dtype) for heads in (H, model.num_kv_heads))
    settings = {"causal": model.causal, "causality": iha.causality, "window": window}
    settings |= {"rope_theta": None if model.positions == "none" else model.rope_theta}
    settings |= {"rope_positions": iha.rope_positions}
    if current_platform() == "tpu":
        from iha_jax.ops.pallas import interleaved_tpu

        work = fused.fused_tpu_work(interleaved_tpu.plan((q, k, k), iha.pseudo_heads, **settings), training=training)
    else:
        from iha_jax.ops.pallas import interleaved_gpu

        blocks = interleaved_gpu.plan((q, k, k), iha.pseudo_heads, **settings)
        work = fused.fused_gpu_work(blocks, width=d, value_width=d, training=training)
    # The kernels run a per-head collapse as a global one.
    return dataclasses.replace(work, collapsed=work.collapsed * H) if iha.collapse == "per_head" else work


def attention_flops(model: ModelConfig, work: Work) -> tuple[float, float]:
    """(scores, mixing) FLOPs of `work`, one row through one layer of `model`, without its projections.

    scores: `2 d H (scores + sums)`; mixing: `2 d` times `H^2 P` (queries), `K H P` (keys, values) and `H^2 P` or `H P`
    (collapse) for each token mixed, and `2 H` times H (talking heads) for each logit and weight exchanged.
    """
    H, K, P, d = model.num_heads, model.num_kv_heads, model.iha.pseudo_heads, model.head_width
    collapse = H * H * P if model.iha.collapse == "global" else H * P
    mixed = work.queries * H * H * P + (work.keys + work.values) * K * H * P + work.collapsed * collapse
    return 2.0 * d * H * (work.scores + work.sums), 2.0 * d * mixed + 2.0 * H * H * work.exchanged


def executed_flops_per_token(
    model: ModelConfig, *, batch_size: int = 1, training: bool = False, segments: bool = True
) -> Flops:
    """FLOPs a token that the model's implementations execute for rows of N tokens, `batch_size` rows at a time;
    `segments` as in `layer_work`.

    scores, mixing: `attention_flops / N` of each layer. Fused mixing: weights are mixed once a forward pass, `2 D d
    (H^2 + 2 K^2)` over all tokens of the batch; with QK-norm `2 d (H^2 + 2 K^2)` a token. Projections, MLP and output
    execute what is useful: once forward, three times in training, and so does fused mixing. One training step without
    gradient accumulation; the loss in one piece.

    Raises:
      ValueError: as `layer_work` does; for training under a `remat` policy, which decides itself what to recompute.
    """
    if training and model.remat != "none":
        raise ValueError(f"remat = {model.remat!r}: executed training FLOPs have a closed form for 'none' alone")
    H, K, d, N = model.num_heads, model.num_kv_heads, model.head_width, model.context_length
    layers = [
        attention_flops(model, layer_work(model, kind, batch_size=batch_size, training=training, segments=segments))
        for kind in model.layer_kinds
    ]
    useful, dense = flops_per_token(model), 3 if training else 1
    weights_mixed = 2.0 * d * (H * H + 2 * K * K) * (1 if model.qk_norm else model.width / (batch_size * N))
    return Flops(
        projections=dense * useful.projections,
        scores=sum(scores for scores, _ in layers) / N,
        mixing=sum(mixing for _, mixing in layers) / N
        + dense * model.layer_kinds.count("fused_mixing") * weights_mixed,
        mlp=dense * useful.mlp,
        output=dense * useful.output,
    )
