"""Closed forms for parameters, FLOPs and decoding caches of every layer kind; one multiply-add is 2 FLOPs.

`useful` FLOPs count the pairs of positions that the mask lets see each other: what tables, fair matching and
utilization use. `executed` FLOPs (`executed.py`) count what a named implementation computes, masked pairs of its blocks
included. Norms, softmax, RoPE and other element-wise work are left out of both (below 2 % at head widths of 64 and up).

Letters: N tokens, V vocabulary, D width, L layers, H heads, K key/value heads, d head width, F MLP width,
P pseudo-heads, W window in tokens.
"""

from dataclasses import dataclass, fields

from iha_jax.config import IHA_KINDS, SIMPLICIAL_KINDS, ModelConfig

# The layer kinds that the formulas below know.
COUNTED = (*IHA_KINDS, *SIMPLICIAL_KINDS, "mha", "mha_local", "talking_heads", "differential", "fused_mixing")

# Peak dense bfloat16 FLOPs a second of one device, by a part of its `device_kind`; vendors' figures.
_PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # jax counts each of a chip's two cores as a device
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOPs a second of a device, None where there is no agreed figure (CPUs, unknown devices)."""
    return next((peak for name, peak in _PEAK.items() if name.lower() in device_kind.lower()), None)


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by role. `attention` holds the projections and QK-norm scales, `mixing` head-mixing weights."""

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

    attention: `L D d (2 H + 2 K)`, and `2 D K d` more in each simplicial layer; with QK-norm `2 L d`, and `d` more in
    each simplicial layer; mixing: `mixing_parameters` of each layer; MLP: `2 L D F` (SwiGLU `3 L D F`); norms:
    `(2 L + 1) D`, and `2 d` in each differential layer; embedding: `V D`, twice if not tied.
    Raises ValueError for a layer kind without a formula.
    """
    for kind in model.layer_kinds:
        check_kind(kind)
    D, L, K, d = model.width, model.num_layers, model.num_kv_heads, model.head_width
    simplicial = sum(kind in SIMPLICIAL_KINDS for kind in model.layer_kinds)
    projections = L * (2 * model.num_heads + 2 * K) + simplicial * 2 * K
    return Parameters(
        embedding=model.vocab_size * D * (1 if model.tie_embeddings else 2),
        attention=D * d * projections + (d * (2 * L + simplicial) if model.qk_norm else 0),
        mixing=sum(mixing_parameters(model, kind) for kind in model.layer_kinds),
        mlp=L * D * model.mlp_width * (3 if model.mlp == "swiglu" else 2),
        norms=(2 * L + 1) * D + 2 * d * model.layer_kinds.count("differential"),
    )


def mixing_parameters(model: ModelConfig, kind: str) -> int:
    """Head-mixing parameters of a layer.

    IHA: `H^2 P + 2 K H P`, plus `H^2 P` (global collapse; together `4 H^2 P` for K = H) or `H P` (per head). Talking
    heads: `2 H^2`. Fused mixing: `H^2 + 2 K^2`. Differential: the four lambda vectors, `4 d`. Others: 0.
    """
    H, K, P = model.num_heads, model.num_kv_heads, model.iha.pseudo_heads
    if kind in IHA_KINDS:
        return H * H * P + 2 * K * H * P + (H * H * P if model.iha.collapse == "global" else H * P)
    return {"talking_heads": 2 * H * H, "fused_mixing": H * H + 2 * K * K, "differential": 4 * model.head_width}.get(
        kind, 0
    )


def visible_pairs(N: int, window: int | None = None, *, causal: bool = True) -> int:
    """Pairs (i, j) of N positions with `0 <= i - j < window`, or `|i - j| < window` if not causal.

    Causal: `w (w + 1) / 2 + (N - w) w` with `w = min(window, N)`; otherwise twice that less the diagonal.
    """
    w = N if window is None else min(window, N)
    pairs = w * (w + 1) // 2 + (N - w) * w
    return pairs if causal else 2 * pairs - N


def visible_triples(N: int, w1: int, w2: int, *, causal: bool = True) -> int:
    """Triples (i, j, k) of N positions with `0 <= i - j < w1` and `0 <= i - k < w2` (absolute, if not causal)."""

    def seen(i: int, w: int) -> int:
        return min(i + 1, w) + (0 if causal else min(N - 1 - i, w - 1))

    return sum(seen(i, w1) * seen(i, w2) for i in range(N))


def layer_pairs(model: ModelConfig, kind: str) -> int:
    """Visible pairs of one head of a layer over a row of N tokens, by the model's `causal`.

    IHA, virtual causality: `visible_pairs(N P, W P)`; token causality: `P^2 visible_pairs(N, W)`. Simplicial: the
    triples (query, key, second key), `visible_triples(N, w1, w2)`. Others: `visible_pairs(N, W)`. Raises
    ValueError for a layer kind without a formula.
    """
    check_kind(kind)
    N, P, causal = model.context_length, model.iha.pseudo_heads, model.causal
    if kind in SIMPLICIAL_KINDS:
        local = kind == "simplicial_local"
        windows = (model.simplicial.window, model.simplicial.second_window) if local else (N, N)
        return visible_triples(N, *windows, causal=causal)
    if kind not in IHA_KINDS:
        return visible_pairs(N, model.window if kind == "mha_local" else None, causal=causal)
    window = model.iha.window if kind == "iha_local" else None
    if model.iha.causality == "token":
        return P * P * visible_pairs(N, window, causal=causal)
    return visible_pairs(N * P, None if window is None else window * P, causal=causal)


def score_flops(model: ModelConfig, kind: str) -> int:
    """FLOPs a visible pair (simplicial: triple) and query head of a layer.

    `2 d` for the logit and `2 d` for the value, `4 d` where values are of width 2d (differential). A simplicial triple
    costs `4 d` too: products of a query with a second key, and of a value with one, are per pair and left out.
    """
    return (6 if kind == "differential" else 4) * model.head_width


def mixing_flops_per_token(model: ModelConfig, kind: str) -> float:
    """Mixing FLOPs a token of a layer.

    IHA, mixing and collapse: `2 d` a mixing parameter (each scales one head). Talking heads: `2 H^2` a visible pair for
    logits and for weights. Fused mixing: nothing a token, since weights are mixed once a step (`2 D d (H^2 + 2 K^2)`);
    with QK-norm `2 d (H^2 + 2 K^2)`. Others: 0.
    """
    parameters = mixing_parameters(model, kind)
    if kind == "talking_heads":
        return 2 * parameters * layer_pairs(model, kind) / model.context_length
    if kind in IHA_KINDS or (kind == "fused_mixing" and model.qk_norm):
        return 2 * model.head_width * parameters
    return 0


def flops_per_token(model: ModelConfig) -> Flops:
    """Useful forward FLOPs a token.

    projections: `2 D d (2 H + 2 K)` a layer, `4 D d K` more in a simplicial one; scores: `score_flops H pairs / N` a
    layer; mixing: `mixing_flops_per_token` of each; MLP: `4 D F` (SwiGLU `6 D F`) a layer; output: `2 D V`.
    """
    D, L, H, K, d = model.width, model.num_layers, model.num_heads, model.num_kv_heads, model.head_width
    kinds, N = model.layer_kinds, model.context_length
    simplicial = sum(kind in SIMPLICIAL_KINDS for kind in kinds)
    return Flops(
        projections=2.0 * D * d * (L * (2 * H + 2 * K) + simplicial * 2 * K),
        scores=sum(score_flops(model, kind) * H * layer_pairs(model, kind) / N for kind in kinds),
        mixing=float(sum(mixing_flops_per_token(model, kind) for kind in kinds)),
        mlp=2.0 * L * D * model.mlp_width * (3 if model.mlp == "swiglu" else 2),
        output=2.0 * D * model.vocab_size,
    )


def training_flops_per_token(model: ModelConfig) -> float:
    """Useful FLOPs of forward and backward: three times the forward pass. Recomputation is not useful work."""
    return 3 * flops_per_token(model).total


def cache_tokens(model: ModelConfig, kind: str, length: int) -> tuple[int, ...]:
    """Tokens whose keys and values a layer keeps while it decodes up to `length` tokens; two numbers for the two sets
    of keys and values of a simplicial layer.

    Windowed layers keep what a query can reach: W tokens, local IHA under virtual causality (and P > 1) W + 1; others
    `length`. Raises ValueError for a layer kind without a formula.
    """
    check_kind(kind)
    iha = model.iha
    one_more = iha.causality == "virtual" and iha.pseudo_heads > 1
    reach = {
        "mha_local": (model.window,),
        "iha_local": (iha.window + one_more,),
        "simplicial": (length, length),
        "simplicial_local": (model.simplicial.window, model.simplicial.second_window),
    }
    return tuple(min(tokens, length) for tokens in reach.get(kind, (length,)))


def cache_bytes(model: ModelConfig, batch_size: int, length: int) -> int:
    """Bytes of the keys and values that decoding `batch_size` rows of up to `length` tokens keeps.

    `2 B K d b` times the `cache_tokens` of all layers, b bytes a number of `compute_dtype`. IHA caches unmixed keys and
    values, so a global IHA layer's cache is as large as an MHA layer's. Raises ValueError for a layer kind without a
    formula.
    """
    tokens = sum(sum(cache_tokens(model, kind, length)) for kind in model.layer_kinds)
    width = {"float32": 4, "bfloat16": 2}[model.compute_dtype]
    return 2 * batch_size * model.num_kv_heads * model.head_width * width * tokens
