"""The training state and the two jitted functions of a run: one optimizer step, one evaluation batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from iha_jax.config import Config
from iha_jax.model import bind, initialize
from iha_jax.parallel.mesh import batch_sharding, replicated
from iha_jax.training.loss import summed_loss, token_losses

State = dict[str, Any]
Batch = dict[str, jax.Array]


def initial_state(config: Config, optimizer: optax.GradientTransformation) -> State:
    """`{"parameters", "optimizer", "step"}` before the first step; a function of `config.seed` alone."""
    parameters = initialize(config.model, jax.random.key(config.seed))
    return {"parameters": parameters, "optimizer": optimizer.init(parameters), "step": jnp.zeros((), jnp.int32)}


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """Returns `step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    The gradient is that of the mean loss over all counted tokens of the batch, whatever `training.accumulation` is:
    micro-batches are summed and divided by the token count of the whole batch. Metrics: `loss` (nats a token),
    `grad_norm` before clipping, `counted_tokens`, `skipped`.

    A step whose loss or gradient norm is not finite is skipped: parameters and optimizer state stay bit for bit what
    they were, `step` alone goes on (the data of a step depend on it), and `skipped` is True. On a mesh both numbers are
    sums over all devices, so all skip or none does.
    """
    accumulation = config.training.accumulation

    def objective(parameters: State, batch: Batch, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        total, nll = _summed(config, parameters, batch)
        return total / count, nll / count

    grad = jax.grad(objective, has_aux=True)

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        parameters = state["parameters"]
        counted = batch["loss_mask"].sum()
        count = jnp.maximum(counted, 1)
        if accumulation == 1:
            gradients, loss = grad(parameters, batch, count)
        else:

            def add(sums: Any, micro: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, sums, grad(parameters, micro, count)), None

            # Micro-batch i takes rows i, i + A, ...: every device keeps its own rows.
            micro = {k: jnp.moveaxis(v.reshape(-1, accumulation, *v.shape[1:]), 1, 0) for k, v in batch.items()}
            zeros = jax.tree.map(jnp.zeros_like, parameters), jnp.zeros((), jnp.float32)
            (gradients, loss), _ = jax.lax.scan(add, zeros, micro)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], parameters)
        updated = {"parameters": optax.apply_updates(parameters, updates), "optimizer": optimizer_state}
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = unless_skipped(finite, updated, {name: state[name] for name in updated})
        metrics = {"loss": loss, "grad_norm": norm, "counted_tokens": counted, "skipped": ~finite}
        return kept | {"step": state["step"] + 1}, metrics

    return step


def unless_skipped(finite: jax.Array, new: Any, old: Any) -> Any:
    """`new` where the step counts, else `old`, bit for bit."""
    return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)


def lower_train_step(
    config: Config, optimizer: optax.GradientTransformation, state: State, mesh: Mesh
) -> jax.stages.Lowered:
    """The train step on `mesh`, its state donated, ready to be compiled; inside `jax.set_mesh(mesh)`.

    `state`: arrays, or shapes with shardings, whose devices need not be here.
    """
    shape = (config.training.batch_size, config.model.context_length)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, dtype in {
            "inputs": jnp.int32,
            "targets": jnp.int32,
            "segment_ids": jnp.int32,
            "loss_mask": jnp.float32,
        }.items()
    }
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh)
    step = jax.jit(make_train_step(config, optimizer), donate_argnums=0, out_shardings=shardings)
    return step.lower(state, batch)


def make_eval_step(config: Config) -> Callable[[State, Batch, jax.Array], dict[str, jax.Array]]:
    """Returns `step(parameters, batch, byte_lengths)`: sums over the counted tokens of each row and of each reach.

    Of rows, each [B]: `nll`, the negative log-likelihood in nats (float32); `tokens` and `text_bytes` (int32), targets
    and the bytes they stand for (`byte_lengths` int32 [V]). Of reaches, each [K]: `reach_nll`, `reach_tokens`, place k
    for targets predicted from 2^k to 2^(k+1) - 1 visible tokens, K = floor(log2 N) + 1.
    """
    K = config.model.context_length.bit_length()

    def step(parameters: State, batch: Batch, byte_lengths: jax.Array) -> dict[str, jax.Array]:
        attended = attended_segments(config, batch["segment_ids"])
        model = bind(config.model, parameters)
        losses_BN = token_losses(model, batch | {"segment_ids": attended}, chunk=config.training.loss_chunk)
        counted_BN = batch["loss_mask"].astype(jnp.int32)
        place_BN = 31 - jax.lax.clz(visible_tokens(batch["inputs"], attended))
        place_BNK = jax.nn.one_hot(place_BN, K, dtype=jnp.int32) * counted_BN[..., None]
        return {
            "nll": losses_BN.sum(1),
            "tokens": counted_BN.sum(1),
            "text_bytes": (byte_lengths[batch["targets"]] * counted_BN).sum(1),
            "reach_nll": jnp.sum(losses_BN[..., None] * place_BNK, axis=(0, 1)),
            "reach_tokens": place_BNK.sum((0, 1)),
        }

    return step


def jit_eval_step(config: Config, mesh: Mesh) -> Callable[[State, Batch, jax.Array], dict[str, jax.Array]]:
    """`make_eval_step`, jitted, its sums whole in every process."""
    return jax.jit(make_eval_step(config), out_shardings=replicated(mesh))


def visible_tokens(inputs_BN: jax.Array, segment_ids_BN: jax.Array | None) -> jax.Array:
    """int32 [B, N]: how many tokens a global causal layer lets each token see: its segment's up to itself."""
    place_BN = jnp.broadcast_to(jnp.arange(inputs_BN.shape[1], dtype=jnp.int32), inputs_BN.shape)
    if segment_ids_BN is None:
        return place_BN + 1
    begins_BN = jnp.pad(segment_ids_BN[:, 1:] != segment_ids_BN[:, :-1], ((0, 0), (1, 0)))
    return place_BN - jax.lax.cummax(jnp.where(begins_BN, place_BN, 0), axis=1) + 1


def attended_segments(config: Config, segment_ids: jax.Array) -> jax.Array | None:
    """What attention is told of a batch's segments: None where it may cross documents.

    Padding stands at the end of a row and counts in no loss, so causal attention needs no segments to ignore it; and
    without them more implementations can run the call.
    """
    return segment_ids if config.data.document_attention else None


def _summed(config: Config, parameters: State, batch: Any) -> tuple[jax.Array, jax.Array]:
    batch = batch | {"segment_ids": attended_segments(config, batch["segment_ids"])}
    model = bind(config.model, parameters)
    return summed_loss(model, batch, z_loss=config.training.z_loss, chunk=config.training.loss_chunk)
