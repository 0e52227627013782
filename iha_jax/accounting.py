"""Closed forms for parameters and FLOPs of every layer kind; one multiply-add is 2 FLOPs.

`useful` FLOPs count the pairs of positions that the mask lets see each other: what tables, fair matching and
utilization use. `executed` FLOPs (`executed.py`) count what a named implementation computes, masked pairs of its blocks
included. Norms, softmax, RoPE and other element-wise work are left out of both (below 2 % at head widths of 64 and up).

Letters: N tokens, V vocabulary, D width, L layers, H heads, K key/value heads, d head width, F MLP width,
P pseudo-heads, W window in tokens.
"""

from dataclasses import dataclass, fields

from iha_jax.config import IHA_KINDS, ModelConfig

COUNTED = (*IHA_KINDS, "mha", "mha_local")  # the layer kinds that the formulas below know

# Peak dense bfloat16 FLOPs a second of one device, by a part of its `device_kind`; vendors' figures.
_PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOPs a second of a device, None where there is no agreed figure (CPUs, unknown devices)."""
    return next((peak for name, peak in _PEAK.items() if name.lower() in device_kind.lower()), None)


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by role. `attention` holds the four projections and QK-norm scales, `mixing` IHA's own."""

    embedding: int
    attention: int
    mixing: int
    mlp: int
    norms: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Flops:
    """FLOPs a token of one forward pass, averaged over the N tokens of a full row of one document."""

    projections: float
    scores: float
    mixing: float
    mlp: float
    output: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def check_kind(kind: str) -> None:
    """Raises ValueError for a layer kind that has no formula here: counting it as another would be silently wrong."""
    if kind not in COUNTED:
        raise ValueError(f"layer kind {kind!r} has no formula in iha_jax/accounting.py; known: {', '.join(COUNTED)}")


def count_parameters(model: ModelConfig) -> Parameters:
    """Parameters of a model.

    attention: `L D d (2 H + 2 K)`, plus `2 L d` with QK-norm; mixing, each IHA layer: `H^2 P + 2 K H P`, plus `H^2 P`
    (global collapse; together `4 H^2 P` for K = H) or `H P` (per head); MLP: `2 L D F` (SwiGLU `3 L D F`);
    norms: `(2 L + 1) D`; embedding: `V D`, twice if not tied. Raises ValueError for a layer kind without a formula.
    """
    for kind in model.layer_kinds:
        check_kind(kind)
    D, L, H, K, d = model.width, model.num_layers, model.num_heads, model.num_kv_heads, model.head_width
    P = model.iha.pseudo_heads
    collapse = H * H * P if model.iha.collapse == "global" else H * P
    iha_layers = sum(kind in IHA_KINDS for kind in model.layer_kinds)
    return Parameters(
        embedding=model.vocab_size * D * (1 if model.tie_embeddings else 2),
        attention=L * (D * d * (2 * H + 2 * K) + (2 * d if model.qk_norm else 0)),
        mixing=iha_layers * (H * H * P + 2 * K * H * P + collapse),
        mlp=L * D * model.mlp_width * (3 if model.mlp == "swiglu" else 2),
        norms=(2 * L + 1) * D,
    )


def visible_pairs(N: int, window: int | None = None, *, causal: bool = True) -> int:
    """Pairs (i, j) of N positions with `0 <= i - j < window`, or `|i - j| < window` if not causal.

    Causal: `w (w + 1) / 2 + (N - w) w` with `w = min(window, N)`; otherwise twice that less the diagonal.
    """
    w = N if window is None else min(window, N)
    pairs = w * (w + 1) // 2 + (N - w) * w
    return pairs if causal else 2 * pairs - N


def layer_pairs(model: ModelConfig, kind: str) -> int:
    """Visible pairs of one head of a layer over a row of N tokens.

    MHA: `visible_pairs(N, W)`. IHA, virtual causality: `visible_pairs(N P, W P)`; token causality:
    `P^2 visible_pairs(N, W)`. Raises ValueError for a layer kind without a formula.
    """
    check_kind(kind)
    N, P = model.context_length, model.iha.pseudo_heads
    if kind not in IHA_KINDS:
        return visible_pairs(N, model.window if kind == "mha_local" else None)
    window = model.iha.window if kind == "iha_local" else None
    if model.iha.causality == "token":
        return P * P * visible_pairs(N, window)
    return visible_pairs(N * P, None if window is None else window * P)


def mixing_flops_per_token(model: ModelConfig) -> int:
    """Mixing and collapse of one IHA layer: `2 d` FLOPs a token and mixing parameter (each scales one head)."""
    H, K, P, d = model.num_heads, model.num_kv_heads, model.iha.pseudo_heads, model.head_width
    collapse = H * H * P if model.iha.collapse == "global" else H * P
    return 2 * d * (H * H * P + 2 * K * H * P + collapse)


def flops_per_token(model: ModelConfig) -> Flops:
    """Useful forward FLOPs a token.

    projections: `2 D d (2 H + 2 K)` a layer; scores (`QK^T` and weights times values): `4 d H pairs / N` a layer;
    MLP: `4 D F` (SwiGLU `6 D F`) a layer; output: `2 D V`.
    """
    D, L, H, K, d = model.width, model.num_layers, model.num_heads, model.num_kv_heads, model.head_width
    kinds = model.layer_kinds
    return Flops(
        projections=2.0 * L * D * d * (2 * H + 2 * K),
        scores=4.0 * d * H * sum(layer_pairs(model, kind) for kind in kinds) / model.context_length,
        mixing=float(mixing_flops_per_token(model) * sum(kind in IHA_KINDS for kind in kinds)),
        mlp=2.0 * L * D * model.mlp_width * (3 if model.mlp == "swiglu" else 2),
        output=2.0 * D * model.vocab_size,
    )


def training_flops_per_token(model: ModelConfig) -> float:
    """Useful FLOPs of forward and backward: three times the forward pass. Recomputation is not useful work."""
    return 3 * flops_per_token(model).total
