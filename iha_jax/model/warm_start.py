"""Starting a model from another's parameters: an IHA model from a trained MHA checkpoint.

Layers are matched by their index, whatever the layer patterns (and so the stacking) of the two models are. Weights the
source lacks keep their initial value; for IHA these are the head-mixing weights, with the options of
`config.model.iha`. The start computes exactly what the MHA model computes when `mixing_init="identity"`,
`init_noise=0` and either `causality="token"` with any `collapse_init` but `random`, or `causality="virtual"` with
`collapse_init="last"`; in both cases with `rope_positions` "token" or "none" as the source has it, and windows as wide
as the source's. With `rope_positions="virtual"` no start is exact.
"""

from typing import Any

from iha_jax.config import ModelConfig
from iha_jax.model.by_layer import stack_layers, weights_by_layer
from iha_jax.model.init import MIXING


def warm_start(target: dict[str, Any], config: ModelConfig, source: dict[str, Any], source_config: ModelConfig) -> dict:
    """`target` (initial parameters of `config`) with every weight that `source` also has replaced by the source's.

    Raises:
      ValueError: listing every weight whose shape differs, and every one but head-mixing weights that only one has.
    """
    target_flat, source_flat = weights_by_layer(target, config), weights_by_layer(source, source_config)
    problems = []
    for name in sorted(target_flat.keys() | source_flat.keys()):
        mixing = name.rsplit("/", 1)[-1] in MIXING
        if name not in source_flat:
            problems += [] if mixing else [f"{name}: not in the source"]
        elif name not in target_flat:
            problems.append(f"{name}: only in the source")
        elif target_flat[name].shape != source_flat[name].shape:
            problems.append(f"{name}: {source_flat[name].shape} in the source, {target_flat[name].shape} here")
    if problems:
        raise ValueError("cannot start from these parameters:\n" + "\n".join(f"  - {p}" for p in problems))
    return stack_layers(target, config, target_flat | source_flat)
