"""Starting a model from another's parameters: an IHA model from a trained MHA checkpoint.

Layers are matched by their index, whatever the layer patterns (and so the stacking) of the two models are. Weights the
source lacks keep their initial value; for IHA these are the head-mixing weights, with the options of
`config.model.iha`. The start computes exactly what the MHA model computes when `mixing_init="identity"`,
`init_noise=0` and either `causality="token"` with any `collapse_init` but `random`, or `causality="virtual"` with
`collapse_init="last"`; in both cases with `rope_positions` "token" or "none" as the source has it, and windows as wide
as the source's. With `rope_positions="virtual"` no start is exact.
"""

from typing import Any

import jax
import jax.numpy as jnp

from iha_jax.config import ModelConfig
from iha_jax.model.init import MIXING


def warm_start(target: dict[str, Any], config: ModelConfig, source: dict[str, Any], source_config: ModelConfig) -> dict:
    """`target` (initial parameters of `config`) with every weight that `source` also has replaced by the source's.

    Raises:
      ValueError: listing every weight whose shape differs, and every one but head-mixing weights that only one has.
    """
    target_flat, source_flat = _by_layer(target, config), _by_layer(source, source_config)
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
    return _stack(target, config, target_flat | source_flat)


def _by_layer(parameters: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """{"layer_3/attention/query": [D, H, d], ..., "embedding": [V, D]}: stacked groups taken apart."""
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        names = [entry.key for entry in path]  # type: ignore[union-attr]
        if names[0] == "groups":
            for group in range(config.num_groups):
                flat["/".join([_layer(names[:2], group, config), *names[2:]])] = leaf[group]
        elif names[0] == "remainder":
            flat["/".join([_layer(names[:2], config.num_groups, config), *names[2:]])] = leaf
        else:
            flat["/".join(names)] = leaf
    return flat


def _layer(names: list[str], group: int, config: ModelConfig) -> str:
    return f"layer_{group * len(config.layer_pattern) + int(names[1].removeprefix('block_'))}"


def _stack(like: dict[str, Any], config: ModelConfig, flat: dict[str, Any]) -> dict[str, Any]:
    def build(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [entry.key for entry in path]
        if names[0] == "groups":
            groups = range(config.num_groups)
            return jnp.stack([flat["/".join([_layer(names[:2], g, config), *names[2:]])] for g in groups])
        if names[0] == "remainder":
            return flat["/".join([_layer(names[:2], config.num_groups, config), *names[2:]])]
        return flat["/".join(names)]

    return jax.tree_util.tree_map_with_path(build, like)
