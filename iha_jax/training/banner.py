"""The first lines of a run: what will be trained, on what, with which kernels."""

import jax
from jax.sharding import Mesh

from iha_jax.accounting import count_parameters, flops_per_token
from iha_jax.config import IHA_KINDS, Config, ConfigError
from iha_jax.model import ATTENTION, abstract_parameters
from iha_jax.ops import Features, target_platform
from iha_jax.ops.implementations import current_platform
from iha_jax.parallel.processes import process_table
from iha_jax.parallel.rules import table


def kernels(config: Config, mesh: Mesh | None = None) -> dict[str, str]:
    """The implementation each kind of layer in the model really uses here ("auto" resolved), on a mesh or without.

    Raises:
      ConfigError: when one that the config names cannot run here, saying why.
    """
    found, problems, split = {}, {}, mesh is not None and mesh.shape["context"] > 1
    for kind in dict.fromkeys(config.model.layer_kinds):
        try:
            found[kind] = _kernel(config, kind, split=split)
        except ValueError as error:
            section = "config.model.iha" if kind in IHA_KINDS else "config.model"
            halo = ", whose halo over config.mesh.context has segments" if split and kind.endswith("_local") else ""
            problems[f"{section}.{error} (layers of kind {kind!r}{halo})"] = None
    if problems:
        raise ConfigError(list(problems))
    return found


def _kernel(config: Config, kind: str, *, split: bool) -> str:
    """`split`: whether tokens are split over devices; then what local layers get has segments (`attention.halo`)."""
    model = config.model
    local = {"mha_local": model.window, "iha_local": model.iha.window, "simplicial_local": model.simplicial.window}
    window = local.get(kind)
    features = Features(
        dtype=model.compute_dtype,
        tokens=model.context_length,
        head_width=model.head_width,
        value_width=model.head_width,
        causal=model.causal,
        window=None if window is None or window >= model.context_length else window,
        segments=config.data.document_attention or (split and kind in local),
    )
    with target_platform(current_platform()):  # on a mesh each device runs the kernel of its own part, alone
        return ATTENTION[kind].kernel(model, features)


def describe(config: Config, mesh: Mesh, start_step: int, data: str) -> str:
    """A few lines for the terminal."""
    model, training = config.model, config.training
    parameters, flops = count_parameters(model), flops_per_token(model)
    device = jax.devices()[0]
    layers = ", ".join(f"{model.layer_kinds.count(kind)} {kind}" for kind in dict.fromkeys(model.layer_kinds))
    window = f", P = {model.iha.pseudo_heads}, IHA window {model.iha.window} tokens" if model.uses_iha else ""
    tokens = training.batch_size * model.context_length
    start = f"resuming after step {start_step}" if start_step else "starting"
    processes = [process_table()] if jax.process_count() > 1 else []
    split = [table(abstract_parameters(model), mesh)] if mesh.size > 1 else []
    return "\n".join(
        [
            f"device     {mesh.size} x {device.device_kind} ({device.platform}), {jax.process_count()} process(es)",
            *processes,
            f"mesh       {dict(mesh.shape)}",
            f"model      {parameters.total:,} parameters ({parameters.mixing:,} head mixing); layers: {layers}{window}",
            f"data       {data}",
            f"compute    {flops.total:,.0f} useful FLOPs a token forward, 3 times that to train; {model.compute_dtype}",
            "kernels    " + ", ".join(f"{kind}: {name}" for kind, name in kernels(config, mesh).items()),
            f"schedule   {training.steps:,} steps of {tokens:,} tokens = {training.steps * tokens:,}; {start}",
            *split,
        ]
    )
