"""Experiments of a config file, checked, as points to train."""

from collections.abc import Sequence
from typing import Any

from iha_jax.config import ConfigError, build
from iha_jax.config_file import apply_override
from iha_jax.learned_tasks.cpm3 import CPM3Experiment
from iha_jax.learned_tasks.experiment import ExperimentConfig, Point
from iha_jax.learned_tasks.polynomial_filters import FiltersExperiment
from iha_jax.relation_composition.experiment import experiments_of

TASKS: dict[str, type[ExperimentConfig]] = {"polynomial_filters": FiltersExperiment, "cpm3": CPM3Experiment}


def load_points(spec: str, overrides: Sequence[str] = ()) -> dict[str, list[Point]]:
    """The points of every experiment that `spec` ("FILE.py" or "FILE.py:cpm3") names, all when it names none;
    `overrides` such as "experiment.seeds=5" apply to all.

    Raises:
      ConfigError: with everything wrong with a name, an override or a value.
      PolynomialFilterError, CPM3Error: for a task that the theory does not take.
    """
    _, module, names = experiments_of(spec)
    return {name: _points(module.get_experiment(name).to_dict(), overrides) for name in names}


def _points(values: dict[str, Any], overrides: Sequence[str]) -> list[Point]:
    problems: list[str] = []
    known = {"experiment": values}
    for override in overrides:
        if override.startswith("experiment.optimizer.learning_rate="):
            problems.append(f"--config.{override}: set by config.experiment.learning_rates")
        else:
            apply_override(known, override, problems)
    task = values.get("task")
    if task not in TASKS:
        raise ConfigError([*problems, f"config.experiment.task = {task!r}: expected one of {', '.join(TASKS)}"])
    experiment = build(TASKS[task], values, "config.experiment", problems)
    if problems or experiment is None:
        raise ConfigError(problems)
    if experiment.batch_size > experiment.train_examples:
        raise ConfigError(
            [
                f"config.experiment.batch_size = {experiment.batch_size}: more than the {experiment.train_examples} "
                f"train_examples"
            ]
        )
    experiment.check()
    return [
        Point(experiment, mechanism, heads, rate)
        for mechanism, heads in experiment.arms
        for rate in experiment.learning_rates
    ]
