"""Weights by layer, whatever the layer pattern and so the stacking: "layer_3/attention/query" [D, H, d]."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from iha_jax.config import ModelConfig


def slices_by_layer(parameters: dict[str, Any], config: ModelConfig) -> dict[str, tuple[Any, int | None]]:
    """{"layer_3/attention/query": (stacked weights [G, D, H, d], 1), ..., "embedding": (weights [V, D], None)}: where
    every weight is, nothing copied. Layers from 0; `parameters` may be shapes."""
    found: dict[str, tuple[Any, int | None]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        names = [entry.key for entry in path]  # type: ignore[union-attr]
        if names[0] == "groups":
            for group in range(config.num_groups):
                found["/".join([_layer(names[:2], group, config), *names[2:]])] = leaf, group
        elif names[0] == "remainder":
            found["/".join([_layer(names[:2], config.num_groups, config), *names[2:]])] = leaf, None
        else:
            found["/".join(names)] = leaf, None
    return found


def weights_by_layer(parameters: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """{"layer_3/attention/query": [D, H, d], ..., "embedding": [V, D]}: stacked groups taken apart."""
    found = slices_by_layer(parameters, config).items()
    return {name: leaf if group is None else leaf[group] for name, (leaf, group) in found}


def stack_layers(like: dict[str, Any], config: ModelConfig, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `weights_by_layer`: a tree such as `like`, which may be of shapes."""

    def build(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [entry.key for entry in path]
        if names[0] == "groups":
            groups = range(config.num_groups)
            return jnp.stack([weights["/".join([_layer(names[:2], g, config), *names[2:]])] for g in groups])
        if names[0] == "remainder":
            return weights["/".join([_layer(names[:2], config.num_groups, config), *names[2:]])]
        return weights["/".join(names)]

    return jax.tree_util.tree_map_with_path(build, like)


def _layer(names: list[str], group: int, config: ModelConfig) -> str:
    return f"layer_{group * len(config.layer_pattern) + int(names[1].removeprefix('block_'))}"
