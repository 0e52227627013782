"""Training of one seed, epoch by epoch, as functions to be mapped over seeds with `jax.vmap`.

Batches have equally many examples of each size, and the model runs on each size by itself, without padding: what padded
rows would give (padding sees nothing and is not seen), for a third to half of the work.
Shapes: S seeds, b examples of one size in a batch, n examples, N = m^2 tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from iha_jax.array_types import Array
from iha_jax.data.relation_composition import Examples
from iha_jax.model.labeller import bind_labeller, initialize_labeller
from iha_jax.relation_composition.experiment import Point
from iha_jax.training.optimizer import make_optimizer

State = dict[str, Any]
Data = dict[int, tuple[Array, Array]]  # of each size m: tokens and labels, int8 [n, N]


class Patience(NamedTuple):
    """The lowest validation loss so far, and the epochs since."""

    best: Array
    waited: Array

    def observe(self, loss: Array, patience: int) -> tuple["Patience", Array]:
        """After one more epoch, and whether it was the best so far. Stopped seeds stay as they are; a loss that is no
        number is no improvement."""
        active = self.waited < patience
        improved = active & (loss < self.best)
        waited = jnp.where(improved, 0, self.waited + active)
        return Patience(jnp.where(improved, loss, self.best), waited), improved


def data_of(point: Point, split: Examples) -> Data:
    return {m: tuple(jnp.asarray(x) for x in split.of_size(m)) for m in point.experiment.sizes}  # type: ignore[misc]


def initial_state(point: Point, seed: Array) -> State:
    """Before the first epoch; a function of the seed and the point's config."""
    parameters = initialize_labeller(point.config.model, jax.random.key(seed))
    return {
        "seed": jnp.asarray(seed, jnp.int32),
        "epoch": jnp.zeros((), jnp.int32),
        "parameters": parameters,
        "optimizer": _optimizer(point).init(parameters),
        "best_parameters": parameters,
        "patience": Patience(jnp.full((), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32)),
    }


def make_step(point: Point) -> Callable[[Any, Any, Data], tuple[Any, Any, Array]]:
    """`step(parameters, optimizer_state, batch) -> (parameters, optimizer_state, loss)`: binary cross-entropy in nats,
    averaged over all entries of the batch."""
    optimizer = _optimizer(point)

    def loss(parameters: Any, batch: Data) -> Array:
        sums = [_entropy(_logits(point, parameters, tokens), labels).sum() for tokens, labels in batch.values()]
        return sum(sums, jnp.zeros(())) / sum(tokens.size for tokens, _ in batch.values())

    def step(parameters: Any, state: Any, batch: Data) -> tuple[Any, Any, Array]:
        value, gradients = jax.value_and_grad(loss)(parameters, batch)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    return step


def make_epoch(point: Point) -> Callable[[State, Data, Data], tuple[State, dict[str, Array]]]:
    """`epoch(state, train, validation) -> (state, row)`: once through the training examples in a new order, then
    validation. Once its patience is spent, a state stays as it is, bit for bit, and `row["active"]` is False."""
    step, patience = make_step(point), point.experiment.patience
    b, steps = point.config.training.batch_size // len(point.experiment.sizes), point.steps_an_epoch

    def epoch(state: State, train: Data, validation: Data) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(state["seed"]), 1), state["epoch"])
        order = {
            m: jax.random.permutation(jax.random.fold_in(key, m), len(tokens))[: steps * b].reshape(steps, b)
            for m, (tokens, _) in train.items()
        }

        def one(carry: tuple[Any, Any], rows: Mapping[int, Array]) -> tuple[tuple[Any, Any], Array]:
            batch = {m: (tokens[rows[m]], labels[rows[m]]) for m, (tokens, labels) in train.items()}
            *carried, loss = step(*carry, batch)
            return tuple(carried), loss  # type: ignore[return-value]

        (parameters, optimizer), losses = jax.lax.scan(one, (state["parameters"], state["optimizer"]), order)
        measured = evaluate(point, parameters, validation)
        active = state["patience"].waited < patience
        watched, improved = state["patience"].observe(measured["loss"], patience)
        trained = {"parameters": parameters, "optimizer": optimizer}
        kept = choose(active, trained, {name: state[name] for name in trained})
        new = state | kept | {"epoch": state["epoch"] + active, "patience": watched}
        new["best_parameters"] = choose(improved, parameters, state["best_parameters"])
        validated = {f"validation_{name}": value for name, value in measured.items()}
        return new, {"active": active, "train_loss": losses.mean(), **validated}

    return epoch


def choose(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def evaluate(point: Point, parameters: Any, data: Data) -> dict[str, Array]:
    """Over all examples: `loss` (nats an entry), `accuracy` (share of entries labelled right, at probability 1/2) and
    `exact` (share of matrices with every entry right)."""
    rows = max(1, point.config.training.batch_size // len(point.experiment.sizes))
    losses, right, exact, matrices, entries = [], [], [], 0, 0
    for tokens, labels in data.values():
        n, N = tokens.shape

        def measure(pair: tuple[Array, Array]) -> tuple[Array, Array]:
            logits = _logits(point, parameters, pair[0])
            return _entropy(logits, pair[1]).sum(1), ((logits > 0) == (pair[1] > 0)).sum(1)

        chunks = -(-n // rows)
        padded = (jnp.pad(x, ((0, chunks * rows - n), (0, 0))).reshape(chunks, rows, N) for x in (tokens, labels))
        loss, correct = (x.reshape(-1)[:n] for x in jax.lax.map(measure, tuple(padded)))
        losses.append(loss.sum())
        right.append(correct.sum())
        exact.append((correct == N).sum())
        matrices, entries = matrices + n, entries + n * N
    total = (sum(x, jnp.zeros(())) for x in (losses, right, exact))
    return {
        name: value / count
        for name, value, count in zip(("loss", "accuracy", "exact"), total, (entries, entries, matrices), strict=True)
    }


def _optimizer(point: Point) -> optax.GradientTransformation:
    return make_optimizer(point.config.optimizer, point.experiment.epochs * point.steps_an_epoch)


def _logits(point: Point, parameters: Any, tokens_bN: Array) -> Array:
    return bind_labeller(point.config.model, parameters)(tokens_bN.astype(jnp.int32))


def _entropy(logits: Array, labels: Array) -> Array:
    return optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype))
