"""Models of plain multi-head attention as Hugging Face's `transformers` names and lays out weights, where a class fits.

| feed-forward | QK-norm | class                | its hidden_act      |
|--------------|---------|----------------------|---------------------|
| swiglu       | no      | `LlamaForCausalLM`   | `silu`              |
| swiglu       | yes     | `Qwen3ForCausalLM`   | `silu`              |
| gelu         | no      | `ArceeForCausalLM`   | `gelu_pytorch_tanh` |
| gelu         | yes     | `ApertusForCausalLM` | `gelu_pytorch_tanh` |

All have RMSNorm before each half of a layer, half-split RoPE, no biases, and grouped key/value heads. A linear layer
is stored as [outputs, inputs]; our [D, H, d] and [H, d, D] become matrices of H d rows or columns, head by head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from iha_jax.config import ModelConfig

_CLASSES = {  # (feed-forward, QK-norm): class, model_type, norm before attention, norm before the feed-forward layer
    ("swiglu", False): ("LlamaForCausalLM", "llama", "input_layernorm", "post_attention_layernorm"),
    ("swiglu", True): ("Qwen3ForCausalLM", "qwen3", "input_layernorm", "post_attention_layernorm"),
    ("gelu", False): ("ArceeForCausalLM", "arcee", "input_layernorm", "post_attention_layernorm"),
    ("gelu", True): ("ApertusForCausalLM", "apertus", "attention_layernorm", "feedforward_layernorm"),
}
# Weight: its name there, and how many of our leading dimensions are inputs of a linear layer (0: stored as it is).
_OUTSIDE = {
    "embedding": ("model.embed_tokens.weight", 0),
    "final_norm/scale": ("model.norm.weight", 0),
    "unembedding": ("lm_head.weight", 1),
}
_INSIDE = {
    "attention/query": ("self_attn.q_proj.weight", 1),
    "attention/key": ("self_attn.k_proj.weight", 1),
    "attention/value": ("self_attn.v_proj.weight", 1),
    "attention/output": ("self_attn.o_proj.weight", 2),
    "attention/query_norm/scale": ("self_attn.q_norm.weight", 0),
    "attention/key_norm/scale": ("self_attn.k_norm.weight", 0),
    "mlp/gate": ("mlp.gate_proj.weight", 1),
    "mlp/up": ("mlp.up_proj.weight", 1),
    "mlp/down": ("mlp.down_proj.weight", 1),
}


@dataclass(frozen=True)
class Stored:
    """How one weight is stored: its name and shape in the file, and the way there and back (numpy arrays)."""

    name: str
    shape: tuple[int, ...]
    write: Callable[[np.ndarray], np.ndarray]
    read: Callable[[np.ndarray], np.ndarray]


def why_not(config: ModelConfig) -> str:
    """Why no class of `transformers` computes what this model does; empty where one does."""
    others = sorted(set(config.layer_kinds) - {"mha"})
    if others:
        return f"it has layers of kind {', '.join(others)}"
    if not config.causal:
        return "it is bidirectional (config.model.causal = False)"
    if config.positions != "rope":
        return f"config.model.positions = {config.positions!r}"
    if config.width % config.num_heads:
        return f"config.model.num_heads = {config.num_heads} does not divide config.model.width = {config.width}"
    return ""


def stored(name: str, shape: tuple[int, ...], config: ModelConfig) -> Stored:
    """The layout of a weight, named as `weights_by_layer` does ("layer_3/attention/query")."""
    layer, _, weight = name.partition("/")
    if layer.startswith("layer_"):
        _, _, attention_norm, mlp_norm = _CLASSES[config.mlp, config.qk_norm]
        norms = {"attention_norm/scale": (f"{attention_norm}.weight", 0), "mlp_norm/scale": (f"{mlp_norm}.weight", 0)}
        place, inputs = (_INSIDE | norms)[weight]
        place = f"model.layers.{layer.removeprefix('layer_')}.{place}"
    else:
        place, inputs = _OUTSIDE[name]
    if not inputs:
        return Stored(place, shape, lambda x: x, lambda x: x)
    rows = math.prod(shape[:inputs])
    columns = math.prod(shape[inputs:])
    return Stored(place, (columns, rows), lambda x: x.reshape(rows, columns).T, lambda x: x.T.reshape(shape))


def transformers_config(config: ModelConfig, document_id: int) -> dict[str, Any]:
    """What `config.json` says to `transformers` (4 and 5 name RoPE's base differently: both are written)."""
    architecture, model_type, _, _ = _CLASSES[config.mlp, config.qk_norm]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu" if config.mlp == "swiglu" else "gelu_pytorch_tanh",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": document_id,
        "eos_token_id": document_id,
        "pad_token_id": None,
    }
