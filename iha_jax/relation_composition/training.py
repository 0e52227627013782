"""Training of one seed, epoch by epoch, as functions to be mapped over seeds with `jax.vmap`.

What is trained is a `Trainable`: a point of relation composition, or of `iha_jax.learned_tasks`.
Batches have equally many examples of each size, and the model runs on each size by itself, without padding: what padded
rows would give (padding sees nothing and is not seen), for a third to half of the work.
Shapes: S seeds, b examples of one size in a batch, n examples, E entries that an example's label has (m^2).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from iha_jax.array_types import Array
from iha_jax.config import OptimizerConfig
from iha_jax.training.optimizer import make_optimizer

State = dict[str, Any]
Data = dict[int, tuple[Array, Array]]  # of each size m: inputs and labels [n, ...]


class Split(Protocol):
    """Examples of one split, of some sizes."""

    def of_size(self, m: int, /) -> tuple[np.ndarray, np.ndarray]: ...


class Experiment(Protocol):
    """How long the points of an experiment train, and on what sizes."""

    @property
    def sizes(self) -> Sequence[int]: ...
    @property
    def seeds(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def patience(self) -> int: ...


class Trainable(Protocol):
    """What is trained at once: all seeds of one model, at one learning rate."""

    @property
    def experiment(self) -> Experiment: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def steps_an_epoch(self) -> int: ...
    @property
    def first_seed(self) -> int: ...
    @property
    def folder(self) -> str: ...

    def facts(self) -> dict[str, Any]:
        """All that the result depends on, as JSON holds it."""
        ...

    def initialize(self, key: Array, /) -> Any:
        """The initial parameters, as nested dictionaries."""
        ...

    def measure(self, parameters: Any, inputs: Array, labels: Array, /) -> tuple[Array, Array]:
        """Of b examples: the loss of every entry and whether it is right, [b, E] both."""
        ...

    def description(self, test: Any, /) -> dict[str, Any]:
        """What the result says of the model and of its test set before anything is measured."""
        ...


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


def data_of(point: Trainable, split: Split) -> Data:
    return {m: tuple(jnp.asarray(x) for x in split.of_size(m)) for m in point.experiment.sizes}  # type: ignore[misc]


def initial_state(point: Trainable, seed: Array) -> State:
    """Before the first epoch; a function of the seed and the point's config."""
    parameters = point.initialize(jax.random.key(seed))
    return {
        "seed": jnp.asarray(seed, jnp.int32),
        "epoch": jnp.zeros((), jnp.int32),
        "parameters": parameters,
        "optimizer": _optimizer(point).init(parameters),
        "best_parameters": parameters,
        "patience": Patience(jnp.full((), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32)),
    }


def make_step(point: Trainable) -> Callable[[Any, Any, Data], tuple[Any, Any, Array]]:
    """`step(parameters, optimizer_state, batch) -> (parameters, optimizer_state, loss)`: what `point.measure`
    says, averaged over all entries of the batch."""
    optimizer = _optimizer(point)

    def loss(parameters: Any, batch: Data) -> Array:
        losses = [point.measure(parameters, *pair)[0] for pair in batch.values()]
        return sum((one.sum() for one in losses), jnp.zeros(())) / sum(one.size for one in losses)

    def step(parameters: Any, state: Any, batch: Data) -> tuple[Any, Any, Array]:
        value, gradients = jax.value_and_grad(loss)(parameters, batch)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    return step


def make_epoch(point: Trainable) -> Callable[[State, Data, Data], tuple[State, dict[str, Array]]]:
    """`epoch(state, train, validation) -> (state, row)`: once through the training examples in a new order, then
    validation. Once its patience is spent, a state stays as it is, bit for bit, and `row["active"]` is False."""
    step, patience = make_step(point), point.experiment.patience
    b, steps = point.batch_size // len(point.experiment.sizes), point.steps_an_epoch

    def epoch(state: State, train: Data, validation: Data) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(state["seed"]), 1), state["epoch"])
        order = {
            m: jax.random.permutation(jax.random.fold_in(key, m), len(inputs))[: steps * b].reshape(steps, b)
            for m, (inputs, _) in train.items()
        }

        def one(carry: tuple[Any, Any], rows: Mapping[int, Array]) -> tuple[tuple[Any, Any], Array]:
            batch = {m: (inputs[rows[m]], labels[rows[m]]) for m, (inputs, labels) in train.items()}
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


def evaluate(point: Trainable, parameters: Any, data: Data) -> dict[str, Array]:
    """Over all examples: `loss` (mean over entries), `accuracy` (share of entries that are right) and `exact` (share of
    examples with every entry right)."""
    rows = max(1, point.batch_size // len(point.experiment.sizes))
    losses, right, exact, examples, entries = [], [], [], 0, 0
    for pair in data.values():
        n, chunks = len(pair[0]), -(-len(pair[0]) // rows)
        E = jax.eval_shape(point.measure, parameters, *pair)[0].shape[1]

        def measure(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
            loss, correct = point.measure(parameters, *chunk)
            return loss.sum(1), correct.sum(1)

        loss, correct = (x.reshape(-1)[:n] for x in jax.lax.map(measure, tuple(_cut(x, chunks, rows) for x in pair)))
        losses.append(loss.sum())
        right.append(correct.sum())
        exact.append((correct == E).sum())
        examples, entries = examples + n, entries + n * E
    total = (sum(x, jnp.zeros(())) for x in (losses, right, exact))
    return {
        name: value / count
        for name, value, count in zip(("loss", "accuracy", "exact"), total, (entries, entries, examples), strict=True)
    }


def _cut(x: Array, chunks: int, rows: int) -> Array:
    """[n, ...] as [chunks, rows, ...], zeros at the end."""
    padding = ((0, chunks * rows - len(x)), *((0, 0),) * (x.ndim - 1))
    return jnp.pad(x, padding).reshape(chunks, rows, *x.shape[1:])


def _optimizer(point: Trainable) -> optax.GradientTransformation:
    return make_optimizer(point.optimizer, point.experiment.epochs * point.steps_an_epoch)
