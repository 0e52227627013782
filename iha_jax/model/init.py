"""All initialization of the model, in one table."""

import math
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from iha_jax.array_types import Array, Float
from iha_jax.config import IhaConfig, ModelConfig

_NORMAL_FAN_IN = {  # number of leading axes a weight contracts over
    "attention/query": 1,
    "attention/key": 1,
    "attention/value": 1,
    "attention/second_key": 1,
    "attention/second_value": 1,
    "attention/output": 2,
    "mlp/up": 1,
    "mlp/gate": 1,
    "mlp/down": 1,
    "unembedding": 1,
}
_RESIDUAL = ("attention/output", "mlp/down")
EMBEDDING_STD = 0.02
LAMBDA_STD = 0.1
MIXING = (  # head-mixing weights: no weight decay, a learning rate of their own, absent from MHA checkpoints
    *("alpha_query", "alpha_key", "alpha_value", "collapse"),
    *("logits_mix", "weights_mix"),
    *("mix_query", "mix_key", "mix_value"),
    *("lambda_query_1", "lambda_key_1", "lambda_query_2", "lambda_key_2"),
)


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, rngs: nnx.Rngs) -> Float[Array, "..."]:
    """The initial value (float32) of the weight `name` of one layer.

    | weight                                      | initial value                                               |
    |---------------------------------------------|-------------------------------------------------------------|
    | embedding [V, D]                            | N(0, 0.02)                                                  |
    | unembedding [D, V] (when not tied)          | N(0, 1/sqrt(D))                                             |
    | attention/query, key, value; mlp/up, gate   | N(0, 1/sqrt(D))                                             |
    | attention/second_key, second_value          | N(0, 1/sqrt(D))                                             |
    | attention/output [H, d, D], mlp/down [F, D] | N(0, 1/sqrt(fan_in)) / sqrt(2 L): they add to the residual  |
    | scale of norms                              | 1                                                           |
    | attention/alpha_query, _key, _value [S,H,P] | by `iha.mixing_init`, plus N(0, `iha.init_noise`)           |
    | - identity                                  | alpha[m,h,p] = 1 if m = s(h): all P are copies of the head  |
    | - shifted                                   | 1 if m = s((h + p) mod H): each p starts from another head  |
    | - first                                     | 1 if m = s(h) and p = 0: the other pseudo-heads are zero    |
    | - random                                    | N(0, 1/sqrt(S))                                             |
    | attention/collapse [H, H, P] or [H, P]      | by `iha.collapse_init`                                      |
    | - mean                                      | R[g,h,p] = 1/P if g = h                                     |
    | - last, first                               | 1 if g = h and p = P - 1 (p = 0)                            |
    | - random                                    | N(0, 1/sqrt(H P)) (global), N(0, 1/sqrt(P)) (per head)      |

    | attention/logits_mix, weights_mix [H, H]    | N(0, 1/sqrt(H)): random, as in the originals                |
    | attention/mix_query, _key, _value [S, S]    | identity: fused mixing starts as MHA                        |
    | attention/lambda_query_1, ... [d]           | N(0, 0.1)                                                   |

    The alphas have S = H source heads for queries and K for keys and values; `s(h) = h // (H / S)`.

    A value depends only on the seed, the layer's index, `name` and `shape`: models whose shapes agree start with the
    same weights, whatever else differs. `rngs.params` must carry the layer's key; its count is not used.
    """
    key = jax.random.fold_in(rngs.params.key[...], zlib.crc32(name.encode()))
    if name.endswith("/scale"):
        return jnp.ones(shape, jnp.float32)
    if name == "embedding":
        return EMBEDDING_STD * jax.random.normal(key, shape, jnp.float32)
    if name.startswith("attention/alpha_"):
        return _initial_alpha(shape, config.iha, key)
    if name in ("attention/logits_mix", "attention/weights_mix"):
        return jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[0])
    if name.startswith("attention/mix_"):
        return jnp.eye(shape[0], dtype=jnp.float32)
    if name.startswith("attention/lambda_"):
        return LAMBDA_STD * jax.random.normal(key, shape, jnp.float32)
    if name == "attention/collapse":
        return _initial_collapse(shape, config.iha, key)
    std = 1 / math.sqrt(math.prod(shape[: _NORMAL_FAN_IN[name]]))
    if name in _RESIDUAL:
        std /= math.sqrt(2 * config.num_layers)
    return std * jax.random.normal(key, shape, jnp.float32)


def _initial_alpha(shape: tuple[int, ...], iha: IhaConfig, key: jax.Array) -> Array:
    sources, heads, pseudo_heads = shape
    noise_key, key = jax.random.split(key)
    noise = iha.init_noise * jax.random.normal(noise_key, shape, jnp.float32)
    if iha.mixing_init == "random":
        return jax.random.normal(key, shape, jnp.float32) / math.sqrt(sources) + noise
    h = jnp.arange(heads)[:, None]
    p = jnp.arange(pseudo_heads)[None]
    start = (h + p) % heads if iha.mixing_init == "shifted" else h + 0 * p
    alpha = jax.nn.one_hot(start // (heads // sources), sources, axis=0)
    if iha.mixing_init == "first":
        alpha = jnp.where(p == 0, alpha, 0.0)
    return alpha + noise


def _initial_collapse(shape: tuple[int, ...], iha: IhaConfig, key: jax.Array) -> Array:
    heads, pseudo_heads = shape[-2:]
    if iha.collapse_init == "random":
        return jax.random.normal(key, shape, jnp.float32) / math.sqrt(math.prod(shape[1:]))
    if iha.collapse_init == "mean":
        weights = jnp.full(pseudo_heads, 1 / pseudo_heads)
    else:
        weights = jax.nn.one_hot(pseudo_heads - 1 if iha.collapse_init == "last" else 0, pseudo_heads)
    if len(shape) == 2:
        return jnp.broadcast_to(weights, shape)
    return jnp.eye(heads)[:, :, None] * weights
