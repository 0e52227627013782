"""What an experiment is: its data, its arms and how long they train, from a config file, checked."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import optax

from iha_jax.array_types import Array
from iha_jax.config import Config, ConfigError, OptimizerConfig, as_dict, build
from iha_jax.config_file import apply_override, load_config, load_module
from iha_jax.data.relation_composition import Examples, make_examples
from iha_jax.model.labeller import bind_labeller, initialize_labeller
from iha_jax.model.transformer import Parameters


def _at_least(low: float, valid: str) -> Any:
    return field(metadata={"low": low, "valid": valid})


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """What `get_experiment(name)` of a config file returns; configs/relation_composition.py describes the fields."""

    hops: int = _at_least(2, "2 or more")
    smallest_size: int = _at_least(1, "1 or more")
    largest_size: int = _at_least(1, "1 or more")
    density: float = field(metadata={"low": 0, "low_open": True, "high": 0.999, "valid": "a number from 0 to 0.999"})
    train_examples: int = _at_least(1, "1 or more")
    validation_examples: int = _at_least(1, "1 or more")
    test_examples: int = _at_least(1, "1 or more")
    data_seed: int = _at_least(0, "0 or more")
    arms: tuple[str, ...]
    learning_rates: tuple[float, ...] = field(metadata={"low": 0, "low_open": True, "valid": "numbers above 0"})
    seeds: int = _at_least(1, "1 or more")
    epochs: int = _at_least(1, "1 or more")
    patience: int = _at_least(1, "1 or more")

    @property
    def sizes(self) -> range:
        return range(self.smallest_size, self.largest_size + 1)


@dataclass(frozen=True)
class Point:
    """One arm at one learning rate: what is trained at once, all seeds of it."""

    experiment: ExperimentConfig
    arm: str
    config: Config  # its model, optimizer (with the learning rate) and batch

    @property
    def learning_rate(self) -> float:
        return self.config.optimizer.learning_rate

    @property
    def folder(self) -> str:
        return f"{self.arm}/learning_rate={self.learning_rate:g}"

    @property
    def steps_an_epoch(self) -> int:
        """Whole batches, each with equally many examples of every size; what is left over waits for another epoch."""
        sizes = len(self.experiment.sizes)
        return (self.experiment.train_examples // sizes) // (self.config.training.batch_size // sizes)

    @property
    def optimizer(self) -> OptimizerConfig:
        return self.config.optimizer

    @property
    def batch_size(self) -> int:
        return self.config.training.batch_size

    @property
    def first_seed(self) -> int:
        return self.config.seed

    def facts(self) -> dict[str, Any]:
        """All that the result depends on, as JSON holds it."""
        own = dataclasses.asdict(self.experiment)
        del own["arms"], own["learning_rates"]  # which other points there are
        used = {name: as_dict(self.config)[name] for name in ("model", "optimizer")}
        return {"experiment": own, **used, "batch_size": self.config.training.batch_size}

    def initialize(self, key: Array) -> Parameters:
        return initialize_labeller(self.config.model, key)

    def measure(self, parameters: Parameters, tokens: Array, labels: Array) -> tuple[Array, Array]:
        """Binary cross-entropy of every entry in nats, and whether it is labelled right, at probability 1/2."""
        logits = bind_labeller(self.config.model, parameters)(tokens.astype(jnp.int32))
        losses = optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype))
        return losses, (logits > 0) == (labels > 0)

    def description(self, test: Examples) -> dict[str, Any]:
        return {
            "arm": self.arm,
            "learning_rate": self.learning_rate,
            "ones": float(test.labels.sum() / test.segment_ids.sum()),
        }


def examples(experiment: ExperimentConfig) -> dict[str, Examples]:
    """The data of an experiment. Raises ValueError where there are fewer relations than it asks for."""
    counts = (experiment.train_examples, experiment.validation_examples, experiment.test_examples)
    return make_examples(
        hops=experiment.hops,
        sizes=(experiment.smallest_size, experiment.largest_size),
        density=experiment.density,
        counts=counts,
        seed=experiment.data_seed,
    )


def load_points(spec: str, overrides: Sequence[str] = ()) -> dict[str, list[Point]]:
    """The points of every experiment that `spec` ("FILE.py" or "FILE.py:reduced,binary") names; of the file's
    `DEFAULT_EXPERIMENTS`, or of all, when it names none. `overrides` such as "experiment.seeds=2" or "model.width=64"
    apply to all.

    Raises:
      ConfigError: with everything wrong with a name, an override or a value.
    """
    path, module, names = experiments_of(spec)
    return {name: _points(module, path, name, overrides) for name in names}


def experiments_of(spec: str) -> tuple[str, Any, list[str]]:
    """The path, the module and the experiments of "FILE.py" or "FILE.py:binary,reduced". Raises ConfigError."""
    path, _, listed = spec.partition(":")
    module = load_module(path)
    if not hasattr(module, "get_experiment"):
        raise ConfigError([f"--config={path}: the file defines no get_experiment(name)"])
    known = tuple(module.EXPERIMENTS)
    names = listed.split(",") if listed else list(getattr(module, "DEFAULT_EXPERIMENTS", known))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError([f"--config={spec}: no experiment {', '.join(unknown)}; there are: {', '.join(known)}"])
    return path, module, names


def _points(module: Any, path: str, name: str, overrides: Sequence[str]) -> list[Point]:
    problems: list[str] = []
    values = {"experiment": module.get_experiment(name).to_dict()}
    for override in overrides:
        if override.startswith("experiment."):
            apply_override(values, override, problems)
        elif override.startswith(("optimizer.learning_rate=", "model.context_length=")):
            problems.append(f"--config.{override}: set by the experiment (learning_rates, largest_size)")
    experiment = build(ExperimentConfig, values["experiment"], "config.experiment", problems)
    if problems or experiment is None:
        raise ConfigError(problems)
    unknown = [arm for arm in experiment.arms if arm not in module.ARMS]
    if unknown:
        known = ", ".join(module.ARMS)
        problems.append(f"config.experiment.arms: no arm {', '.join(unknown)}; arms of {path}: {known}")
    if experiment.smallest_size > experiment.largest_size:
        problems.append(
            f"config.experiment.smallest_size = {experiment.smallest_size}: larger than largest_size = "
            f"{experiment.largest_size}"
        )
    if problems:
        raise ConfigError(problems)
    ours = [o for o in overrides if not o.startswith("experiment.")]
    ours.append(f"model.context_length={experiment.largest_size**2}")
    points = [
        Point(experiment, arm, load_config(f"{path}:{arm}", [*ours, f"optimizer.learning_rate={rate}"]))
        for rate in experiment.learning_rates
        for arm in experiment.arms
    ]
    problems += _check_batch(points[0]) + _check_models(points)
    if problems:
        raise ConfigError(problems)
    return points


def _check_batch(point: Point) -> list[str]:
    batch, sizes = point.config.training.batch_size, len(point.experiment.sizes)
    if batch % sizes:
        nearest = max(1, round(batch / sizes)) * sizes
        return [
            f"config.training.batch_size = {batch}: not divisible by the {sizes} sizes of relations, of which a batch "
            f"has equally many; choose {nearest}"
        ]
    if not point.steps_an_epoch:
        return [f"config.training.batch_size = {batch}: more than the {point.experiment.train_examples} train_examples"]
    return []


def _check_models(points: Sequence[Point]) -> list[str]:
    problems = []
    for point in points:
        model = point.config.model
        for key, wanted in (("vocab_size", 2), ("num_layers", 1), ("causal", False), ("positions", "none")):
            if getattr(model, key) != wanted:
                problems.append(f"config.model.{key} = {getattr(model, key)!r}: a labeller needs {wanted!r}")
        if model.compute_dtype != "float32":
            problems.append(f"config.model.compute_dtype = {model.compute_dtype!r}: a labeller computes in 'float32'")
    return list(dict.fromkeys(problems))
