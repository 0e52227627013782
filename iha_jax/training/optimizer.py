"""AdamW with warm-up and cosine, no decay on norms, biases and head mixing, and head mixing's own learning rate."""

from typing import Any

import jax
import optax

from iha_jax.config import OptimizerConfig
from iha_jax.model.init import MIXING


def is_mixing(path: str) -> bool:
    """Whether a parameter path such as "groups/block_0/attention/alpha_query" is a head-mixing weight."""
    return path.rsplit("/", 1)[-1] in MIXING


def is_decayed(path: str) -> bool:
    """Whether weight decay applies: to everything but norms' scales, biases and head-mixing weights."""
    return not is_mixing(path) and not path.endswith(("scale", "bias"))


def path_name(path: tuple[Any, ...]) -> str:
    """A JAX key path of nested dictionaries as "a/b/c"."""
    return "/".join(str(entry.key) for entry in path)


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of step s = 0 .. steps - 1: linear to the peak, then a cosine to the floor.

    `peak * (s + 1) / warmup` for s < warmup (so the first step learns), then
    `floor + (peak - floor) * (1 + cos(pi * (s - warmup) / (steps - 1 - warmup))) / 2`, the floor at the last step.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    cosine = optax.cosine_decay_schedule(peak, max(1, steps - 1 - warmup), alpha=config.final_fraction)
    if not warmup:
        return cosine
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, cosine], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; states are float32 as the parameters are.

    `update = -lr(s) * multiplier * (m / (sqrt(v) + epsilon) + weight_decay * parameter)`, the decay where `is_decayed`,
    the multiplier `mixing_multiplier` where `is_mixing` and 1 elsewhere.
    """

    def decayed(parameters: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: is_decayed(path_name(path)), parameters)

    def multiply(updates: Any, _: Any = None) -> Any:
        def one(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
            return update * config.mixing_multiplier if is_mixing(path_name(path)) else update

        return jax.tree_util.tree_map_with_path(one, updates)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
        optax.stateless(multiply),
    )
