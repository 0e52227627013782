"""Where a run's first state comes from: its own last checkpoint, another run's parameters or all of it, or the seed."""

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
from iha_jax.training.meter import FLOPS_OFFSET, flops_per_step
from iha_jax.training.optimizer import make_optimizer
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
    new state is `initial_state`, its parameters replaced by `training.init_from`'s where that is set. With
    `training.init_from_state` it is all of the other run's: the optimizer state and the step, from which schedule and
    data go on, and what that run has cost.

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
    if config.training.init_from_state:
        with _source_checkpoints(config) as source_checkpoints:
            step = config.training.init_from_step or source_checkpoints.common_steps()[-1]  # check_source found one
            state, carried = source_checkpoints.restore(like, step), source_checkpoints.metadata(step)
        more = flops_per_step(load_run_config(config.training.init_from)) - flops_per_step(config)
        return state, carried | {FLOPS_OFFSET: carried.get(FLOPS_OFFSET, 0.0) + more * step}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    state = jax.jit(lambda: initial_state(config, optimizer), out_shardings=shardings)()  # never whole on one device
    if config.training.init_from:
        source_config, source = _load_source(config, mesh)
        parameters = warm_start(state["parameters"], config.model, source, source_config.model)
        state["parameters"] = jax.jit(lambda x: x, out_shardings=shardings["parameters"])(parameters)
    return state, {}


def check_source(config: Config) -> None:
    """Refuses, before anything is written, a `training.init_from` that does not fit: its parameters, or with
    `init_from_state` all arrays by name, shape and dtype, and a step that leaves some to train. Reads no arrays."""
    training = config.training
    if not training.init_from:
        return
    source_config = load_run_config(training.init_from)
    with _source_checkpoints(config) as checkpoints:
        step = _source_step(config, checkpoints)
        if training.init_from_state:
            if step >= training.steps:
                raise ConfigError(
                    [
                        f"config.training.steps = {training.steps}: config.training.init_from = {training.init_from!r} "
                        f"is at step {step} already, and with init_from_state its steps count; set more than {step}"
                    ]
                )
            _check_state(config, source_config)
            return
    jax.eval_shape(
        lambda target, source: warm_start(target, config.model, source, source_config.model),
        abstract_parameters(config.model),
        abstract_parameters(source_config.model),
    )


def _check_state(config: Config, source: Config) -> None:
    def arrays(of: Config) -> dict[str, tuple[tuple[int, ...], str]]:
        state = jax.eval_shape(lambda: initial_state(of, make_optimizer(of.optimizer, of.training.steps)))
        leaves = jax.tree_util.tree_leaves_with_path(state)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): (x.shape, str(x.dtype)) for path, x in leaves}

    here, there = arrays(config), arrays(source)
    wrong = [
        f"  - {name}: {there.get(name, 'nothing')} in the source, {here.get(name, 'nothing')} here"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    if wrong:
        raise ValueError(
            f"config.training.init_from_state = True: the state of {config.training.init_from!r} does not fit; with "
            f"False its parameters alone must:\n" + "\n".join(wrong)
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
