"""All partition rules on one screen: which mesh axis splits which dimension of every weight and activation.

A dimension is a letter: V vocabulary, D width, H heads, K key/value heads, F feed-forward width, B batch, N tokens.
Lower-case dimensions are never split. Optimizer states are split as their weights are; the stacked dimension of scanned
groups comes in front of a weight's own and is never split. Tokens are split over `context`, weights are not.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from iha_jax.array_types import Array
from iha_jax.config import ConfigError, ModelConfig

Axes = str | tuple[str, ...] | None

WEIGHT_AXES: Mapping[str, Axes] = {"V": "tensor", "D": "fsdp", "H": "tensor", "K": "tensor", "F": "tensor"}
ACTIVATION_AXES: Mapping[str, Axes] = {
    "B": ("data", "fsdp"),
    "V": "tensor",
    "H": "tensor",
    "K": "tensor",
    "F": "tensor",
    "N": "context",
    "D": None,
}
WEIGHTS: Mapping[str, str] = {  # end of a weight's path: its dimensions
    "embedding": "V D",
    "unembedding": "D V",
    "attention/query": "D H d",
    "attention/key": "D K d",
    "attention/value": "D K d",
    "attention/output": "H d D",
    "attention/second_key": "D K d",
    "attention/second_value": "D K d",
    # Mixing weights are small and mix all heads: every device holds them whole.
    "attention/alpha_query": "s h p",
    "attention/alpha_key": "s h p",
    "attention/alpha_value": "s h p",
    "attention/collapse": "*",  # [H, H, P] or [H, P]
    "attention/logits_mix": "h h",
    "attention/weights_mix": "h h",
    "attention/mix_query": "h h",
    "attention/mix_key": "h h",
    "attention/mix_value": "h h",
    "attention/lambda_query_1": "d",
    "attention/lambda_key_1": "d",
    "attention/lambda_query_2": "d",
    "attention/lambda_key_2": "d",
    "mlp/up": "D F",
    "mlp/gate": "D F",
    "mlp/down": "F D",
    "scale": "*",
}
_FIELDS = {
    "V": "vocab_size",
    "D": "width",
    "H": "num_heads",
    "K": "num_kv_heads",
    "F": "mlp_width",
    "N": "context_length",
}


def weight_spec(path: str, ndim: int) -> PartitionSpec:
    """The partition of the weight, or optimizer state of a weight, at `path` ("groups/block_0/mlp/up").

    Raises:
      ValueError: for a weight that no rule or more than one matches, has other dimensions than its rule says, or two
        dimensions on one mesh axis.
    """
    if ndim == 0:
        return PartitionSpec()
    found = [name for name in WEIGHTS if f"/{path}".endswith(f"/{name}")]
    if len(found) != 1:
        raise ValueError(
            f"weight {path}: {len(found)} partition rules match ({', '.join(found) or 'none'}); expected 1"
        )
    dimensions = WEIGHTS[found[0]].split()
    if dimensions == ["*"]:
        return PartitionSpec()
    stacked = ndim - len(dimensions)
    if stacked != ("groups" in path.split("/")):
        raise ValueError(f"weight {path} has {ndim} dimensions; its partition rule has {WEIGHTS[found[0]]!r}")
    axes = [WEIGHT_AXES.get(dimension) for dimension in dimensions]
    used = [axis for axis in axes if axis]
    if len(set(used)) < len(used):
        raise ValueError(f"weight {path} ({WEIGHTS[found[0]]!r}): two dimensions are split over one mesh axis")
    return PartitionSpec(*[None] * stacked, *axes)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a training state or parameter tree (arrays or shapes)."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, weight_spec(_name(path), leaf.ndim))

    return jax.tree_util.tree_map_with_path(one, state)


def check_split(model: ModelConfig, mesh: Mesh) -> None:
    """Raises ConfigError, naming field and nearest valid values, for a model that cannot be split over this mesh."""
    problems = []
    for dimension, field in _FIELDS.items():
        axis, size = WEIGHT_AXES.get(dimension) or ACTIVATION_AXES[dimension], getattr(model, field)
        assert isinstance(axis, str)
        parts, pairs = mesh.shape[axis], dimension in "HK" and "differential" in model.layer_kinds
        unit = parts * (2 if pairs and parts > 1 else 1)
        if size % unit:
            near = [n for n in (size // unit * unit, -(-size // unit) * unit) if n]
            problems.append(
                f"config.model.{field} = {size}: does not divide over config.mesh.{axis} = {parts}"
                f"{' in pairs' if pairs else ''}; choose {' or '.join(map(str, near))}, or another mesh"
            )
    parts = mesh.shape["tensor"] * mesh.shape["context"]
    if mesh.shape["tensor"] > 1 and "iha_local" in model.layer_kinds and model.context_length % parts:
        near = [n for n in (model.context_length // parts * parts, -(-model.context_length // parts) * parts) if n]
        problems.append(
            f"config.model.context_length = {model.context_length}: local IHA layers split it over config.mesh.context "
            f"* config.mesh.tensor = {parts}; choose {' or '.join(map(str, near))}, or another mesh"
        )
    for axis in ("tensor", "context"):  # whole rows, without which no logits are whole, come for a share of the heads
        if mesh.shape[axis] > 1 and "talking_heads" in model.layer_kinds:
            problems.append(
                f"config.mesh.{axis} = {mesh.shape[axis]}: talking heads mix the logits of all heads, so heads cannot "
                f"be split; choose 1"
            )
    if problems:
        raise ConfigError(problems)


def constrain(x: Array, dimensions: str) -> Array:
    """`x` laid out by `ACTIVATION_AXES`, such as `constrain(x_BND, "B N D")`; x itself where no mesh is set."""
    return x if mesh_in_use() is None else jax.lax.with_sharding_constraint(x, activation_spec(dimensions))


def mesh_in_use() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`, None where there is none or it is of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def shards(dimension: str) -> int:
    """Over how many devices a dimension of activations that has one axis ("N", "H", ...) is split here."""
    mesh, axis = mesh_in_use(), ACTIVATION_AXES[dimension]
    return mesh.shape[axis] if mesh is not None and isinstance(axis, str) else 1


def activation_spec(dimensions: str) -> PartitionSpec:
    return PartitionSpec(*(ACTIVATION_AXES.get(dimension) for dimension in dimensions.split()))


def table(parameters: Any, mesh: Mesh) -> str:
    """Every weight with its shape, how it is split and what a device holds, for the first lines of a run."""
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        sharding = NamedSharding(mesh, weight_spec(_name(path), leaf.ndim))
        split = ", ".join(f"{axis}" if axis else "-" for axis in (*sharding.spec, *[None] * leaf.ndim)[: leaf.ndim])
        lines.append((_name(path), str(tuple(leaf.shape)), f"({split})", str(sharding.shard_shape(leaf.shape))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
