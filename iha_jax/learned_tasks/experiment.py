"""What all learned tasks have in common: how an experiment is stated, and its points."""

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from iha_jax.array_types import Array
from iha_jax.config import OptimizerConfig
from iha_jax.learned_tasks.layer import GivenShifts, Layer, Parameters

SPLITS = ("train", "validation", "test")
MHA, IHA, MATCHED = "mha", "iha", "mha_matched"


def at_least(low: int) -> Any:
    return field(metadata={"low": low, "valid": f"{low} or more"})


class Examples(NamedTuple):
    """One split: inputs [n, N, r] and labels [n, N, ...], float32."""

    inputs: np.ndarray
    labels: np.ndarray

    def of_size(self, _: int, /) -> tuple[np.ndarray, np.ndarray]:
        return self.inputs, self.labels


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """What `get_experiment(name)` of a config file returns; configs/learned_tasks.py describes the fields."""

    task: str
    tokens: int = at_least(1)
    mha_heads: tuple[int, ...] = at_least(1)
    iha_heads: tuple[int, ...] = at_least(1)
    matched_heads: tuple[int, ...] = at_least(1)
    learning_rates: tuple[float, ...] = field(metadata={"low": 0, "low_open": True, "valid": "numbers above 0"})
    train_examples: int = at_least(1)
    validation_examples: int = at_least(1)
    test_examples: int = at_least(1)
    data_seed: int = at_least(0)
    batch_size: int = at_least(1)
    seeds: int = at_least(1)
    epochs: int = at_least(1)
    patience: int = at_least(1)
    optimizer: OptimizerConfig

    @property
    def counts(self) -> bool:
        """Whether labels are counts, one of which is the commonest."""
        return False

    @property
    def sizes(self) -> tuple[int]:
        return (self.tokens,)

    @property
    def split_sizes(self) -> tuple[int, int, int]:
        return self.train_examples, self.validation_examples, self.test_examples

    @property
    def arms(self) -> list[tuple[str, int]]:
        """Every mechanism with every number of heads."""
        heads = {MHA: self.mha_heads, MATCHED: self.matched_heads, IHA: self.iha_heads}
        return [(mechanism, H) for mechanism, listed in heads.items() for H in listed]

    @property
    def width(self) -> int:
        """r, numbers that a token has besides its position; the value width of an MHA head in the theorem."""
        return 1

    def value_width(self, mechanism: str, H: int) -> int:
        """Of MHA `r`, of IHA `r H`, as in the constructions; of `mha_matched` the smallest with which MHA of H heads
        has IHA's attention parameters: `r H + ceil(4 H^2 / (N + r))`."""
        mixing = -(-4 * H * H // (self.tokens + self.width))
        return {MHA: self.width, IHA: self.width * H, MATCHED: self.width * H + mixing}[mechanism]

    @abstractmethod
    def check(self) -> None:
        """Raises the theory's named error, a ValueError, for a task that it does not take."""

    @abstractmethod
    def layer(self, mechanism: str, H: int) -> Layer | GivenShifts: ...

    @abstractmethod
    def examples(self) -> dict[str, Examples]:
        """All `SPLITS`; a function of the config alone. Raises ValueError."""

    @abstractmethod
    def measure(self, outputs: Array, labels: Array) -> tuple[Array, Array]:
        """Loss of every entry, as a share of the variance it has, and whether the entry is right: [b, E]."""

    @abstractmethod
    def heads_by_theorem(self) -> dict[str, int]:
        """Heads of the constructions."""

    @abstractmethod
    def describe(self) -> str:
        """What the task is, what is right and what is fixed as heads grow."""


@dataclass(frozen=True)
class Point:
    """One mechanism with some heads at one learning rate: what is trained at once, all seeds of it."""

    experiment: ExperimentConfig
    mechanism: str
    heads: int
    learning_rate: float
    first_seed: int = 0

    @property
    def layer(self) -> Layer | GivenShifts:
        return self.experiment.layer(self.mechanism, self.heads)

    @property
    def folder(self) -> str:
        return f"{self.mechanism}/heads={self.heads}/learning_rate={self.learning_rate:g}"

    @property
    def optimizer(self) -> OptimizerConfig:
        return dataclasses.replace(self.experiment.optimizer, learning_rate=self.learning_rate)

    @property
    def batch_size(self) -> int:
        return self.experiment.batch_size

    @property
    def steps_an_epoch(self) -> int:
        return self.experiment.train_examples // self.batch_size

    def facts(self) -> dict[str, Any]:
        own = dataclasses.asdict(self.experiment)
        for other_points in ("mha_heads", "iha_heads", "matched_heads", "learning_rates"):
            del own[other_points]
        layer = {"mechanism": self.mechanism, **dataclasses.asdict(self.layer)}
        return {"experiment": own | {"optimizer": dataclasses.asdict(self.optimizer)}, "layer": layer}

    def initialize(self, key: Array) -> Parameters:
        return self.layer.initialize(key)

    def measure(self, parameters: Parameters, inputs: Array, labels: Array) -> tuple[Array, Array]:
        return self.experiment.measure(self.layer(parameters, inputs), labels)

    def description(self, test: Examples) -> dict[str, Any]:
        layer = self.layer
        return {
            "mechanism": self.mechanism,
            "heads": self.heads,
            "value_width": layer.value_width,
            "attention_parameters": layer.attention_parameters,
            "learning_rate": self.learning_rate,
            "commonest": commonest(test.labels),
        }


def commonest(labels: np.ndarray) -> float:
    """The share of the commonest label."""
    return float(np.unique(labels, return_counts=True)[1].max() / labels.size)
