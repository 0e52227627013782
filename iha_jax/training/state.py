"""Where a run's first state comes from: its own last checkpoint, another run's parameters, or the seed."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import Mesh

from iha_jax.config import Config, ConfigError
from iha_jax.model import abstract_parameters
from iha_jax.model.warm_start import warm_start
from iha_jax.parallel.rules import state_shardings
from iha_jax.training.checkpoint import CheckpointCorrupt, Checkpointer
from iha_jax.training.run_directory import load_run_config
from iha_jax.training.step import State, initial_state


def abstract_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of the training state; allocates nothing."""
    return _placed(jax.eval_shape(lambda: initial_state(config, optimizer)), mesh)


def abstract_parameters_on(config: Config, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the parameters alone."""
    return _placed(abstract_parameters(config.model), mesh)


def _placed(tree: Any, mesh: Mesh) -> Any:
    def place(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree, state_shardings(tree, mesh))


def starting_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpointer,
    mesh: Mesh,
    tell: Callable[[str], None],
) -> tuple[State, dict[str, Any]]:
    """`(state, metadata of its checkpoint)`: of the newest checkpoint that is what was saved, else new, no metadata.

    Corrupt checkpoints are told, one line each, and moved to `quarantine/`; all processes fall back to the same one. A
    new state is `initial_state`, its parameters replaced by `training.init_from`'s where that is set.

    Raises:
      CheckpointCorrupt: when there are or were checkpoints and none is sound: nothing is trained anew over them.
      CheckpointMismatch: when the newest sound one is of another model or optimizer.
    """
    like = abstract_state(config, optimizer, mesh)
    for step in reversed(checkpoints.common_steps()):
        try:
            state = checkpoints.restore(like, step)
        except CheckpointCorrupt as error:
            tell(f"WARNING: {error}; moved to {checkpoints.quarantine(step, str(error))}, falling back to an older one")
            continue
        checkpoints.adopt(step)
        return state, checkpoints.metadata(step)
    if moved := checkpoints.quarantined():  # now or at an earlier start
        raise CheckpointCorrupt(
            f"no checkpoint is left that is sound; quarantine/ beside them has {', '.join(moved)}. To train from the "
            f"beginning use another workdir"
        )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    state = jax.jit(lambda: initial_state(config, optimizer), out_shardings=shardings)()  # never whole on one device
    if config.training.init_from:
        source_config, source = _load_source(config, mesh)
        parameters = warm_start(state["parameters"], config.model, source, source_config.model)
        state["parameters"] = jax.jit(lambda x: x, out_shardings=shardings["parameters"])(parameters)
    return state, {}


def check_source(config: Config) -> None:
    """Refuses, before anything is written, a `training.init_from` whose parameters do not fit. Reads no arrays."""
    if not config.training.init_from:
        return
    source_config = load_run_config(config.training.init_from)
    with _source_checkpoints(config) as checkpoints:
        _source_step(config, checkpoints)
    jax.eval_shape(
        lambda target, source: warm_start(target, config.model, source, source_config.model),
        abstract_parameters(config.model),
        abstract_parameters(source_config.model),
    )


def _load_source(config: Config, mesh: Mesh) -> tuple[Config, Any]:
    source_config = load_run_config(config.training.init_from)
    like = abstract_parameters_on(source_config, mesh)
    with _source_checkpoints(config) as checkpoints:
        step = config.training.init_from_step or checkpoints.common_steps()[-1]  # check_source found one
        return source_config, checkpoints.restore_parameters(like, step)


def _source_checkpoints(config: Config) -> Checkpointer:
    return Checkpointer(epath.Path(config.training.init_from) / "checkpoints", writable=False)


def _source_step(config: Config, checkpoints: Checkpointer) -> int:
    step = config.training.init_from_step or checkpoints.latest_step()
    if step is None:
        raise ConfigError([f"config.training.init_from = {config.training.init_from!r}: no checkpoint there"])
    return step
