"""The first lines of a run: what will be trained, on what, with which kernels."""

import jax
from jax.sharding import Mesh

from iha_jax.accounting import count_parameters, flops_per_token
from iha_jax.config import IHA_KINDS, Config
from iha_jax.ops import resolve_attention_implementation, resolve_interleaved_implementation


def kernels(config: Config) -> dict[str, str]:
    """The implementation each kind of layer in the model really uses here ("auto" resolved)."""
    model = config.model
    return {
        kind: resolve_interleaved_implementation(model.iha.implementation)
        if kind in IHA_KINDS
        else resolve_attention_implementation(model.implementation)
        for kind in dict.fromkeys(model.layer_kinds)
    }


def describe(config: Config, mesh: Mesh, start_step: int) -> str:
    """A few lines for the terminal."""
    model, training = config.model, config.training
    parameters, flops = count_parameters(model), flops_per_token(model)
    device = jax.devices()[0]
    layers = ", ".join(f"{model.layer_kinds.count(kind)} {kind}" for kind in dict.fromkeys(model.layer_kinds))
    window = f", P = {model.iha.pseudo_heads}, IHA window {model.iha.window} tokens" if model.uses_iha else ""
    tokens = training.batch_size * model.context_length
    start = f"resuming after step {start_step}" if start_step else "starting"
    return "\n".join(
        [
            f"device     {mesh.size} x {device.device_kind} ({device.platform}), {jax.process_count()} process(es)",
            f"mesh       {dict(mesh.shape)}",
            f"model      {parameters.total:,} parameters ({parameters.mixing:,} head mixing); layers: {layers}{window}",
            f"compute    {flops.total:,.0f} useful FLOPs a token forward, 3 times that to train; {model.compute_dtype}",
            "kernels    " + ", ".join(f"{kind}: {name}" for kind, name in kernels(config).items()),
            f"schedule   {training.steps:,} steps of {tokens:,} tokens = {training.steps * tokens:,}; {start}",
        ]
    )
