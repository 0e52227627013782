"""The arms of a comparison: those the config file names, and control arms derived from them by rule."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iha_jax.accounting import flops_per_token
from iha_jax.config import Config, ConfigError, ModelConfig
from iha_jax.config_file import load_config, load_module

CONTROLS = ("widened", "longer")


@dataclass(frozen=True)
class Comparison:
    """What a config file's `get_comparison()` asks for."""

    path: str
    arms: tuple[str, ...]
    seeds: int
    learning_rates: tuple[float, ...]
    controls: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One run of a comparison: an arm, perhaps at a learning rate of its own, with a seed."""

    arm: str
    base_arm: str
    seed: int
    learning_rate: float | None
    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        rate = "" if self.learning_rate is None else f"/lr{self.learning_rate:g}"
        return f"{self.arm}{rate}/seed{self.seed}"


def load_comparison(path: str) -> Comparison:
    """Reads and checks `get_comparison()` of a config file. Raises ConfigError with every problem."""
    if ":" in path:
        raise ConfigError([f"--config={path}: name the file alone; its get_comparison() says which arms run"])
    module = load_module(path)
    if not hasattr(module, "get_comparison"):
        raise ConfigError([f"--config={path}: the file defines no get_comparison()"])
    values = module.get_comparison()
    values = values.to_dict() if hasattr(values, "to_dict") else dict(values)
    known = {field.name for field in dataclasses.fields(Comparison)} - {"path"}
    problems = [
        f"comparison.{key}: no such key; valid keys: {', '.join(sorted(known))}" for key in values.keys() - known
    ]
    problems += [f"comparison.{key} is missing" for key in known - values.keys()]
    if not problems:
        problems = _check_values(values, tuple(getattr(module, "ARMS", ())))
    if problems:
        raise ConfigError(problems)
    return Comparison(
        path,
        tuple(values["arms"]),
        values["seeds"],
        tuple(float(rate) for rate in values["learning_rates"]),
        tuple(values["controls"]),
    )


def _check_values(values: dict[str, Any], known_arms: Sequence[str]) -> list[str]:
    problems = []
    arms = values["arms"]
    if isinstance(arms, str) or not arms or len(set(arms)) != len(arms) or not set(arms) <= set(known_arms):
        problems.append(f"comparison.arms = {arms!r}: expected different ones of {', '.join(known_arms)}")
    if isinstance(values["seeds"], bool) or not isinstance(values["seeds"], int) or values["seeds"] < 1:
        problems.append(f"comparison.seeds = {values['seeds']!r}: expected a positive number of seeds")
    for rate in values["learning_rates"]:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1e3:
            problems.append(f"comparison.learning_rates has {rate!r}: expected positive numbers")
    for control in values["controls"]:
        if control not in CONTROLS:
            problems.append(f"comparison.controls has {control!r}: expected some of {', '.join(CONTROLS)}")
    return problems


def widened_mlp(baseline: ModelConfig, other: ModelConfig) -> int:
    """The smallest MLP width at which the baseline's useful FLOPs a token reach the other model's.

    Each unit of width costs `4 D` FLOPs a token and layer (SwiGLU `6 D`), so the mixing cost is given back to the
    baseline as MLP. Never below the baseline's own width.
    """
    missing = flops_per_token(other).total - flops_per_token(baseline).total
    unit = flops_per_token(dataclasses.replace(baseline, mlp_width=1)).mlp
    return baseline.mlp_width + max(0, -int(-missing // unit))


def longer_steps(steps: int, seconds_a_step: float, other_seconds_a_step: float) -> int:
    """Steps of the baseline that take as long as the other arm's `steps`; never fewer than `steps`."""
    return max(steps, round(steps * other_seconds_a_step / seconds_a_step))


def planned_runs(comparison: Comparison, overrides: Sequence[str]) -> list[Run]:
    """All runs but those of `longer`, whose length is only known later; seed 0 of every arm first.

    Every config is resolved here, so that a bad one is refused before the first run starts.
    """
    arms: list[tuple[str, str, tuple[str, ...]]] = [(arm, arm, ()) for arm in comparison.arms]
    if "widened" in comparison.controls:
        first, last = (resolved(comparison, arm, overrides).model for arm in (comparison.arms[0], comparison.arms[-1]))
        width = f"model.mlp_width={widened_mlp(first, last)}"
        arms.append((f"{comparison.arms[0]}_widened", comparison.arms[0], (width,)))
    rates = comparison.learning_rates or (None,)
    runs = []
    for seed in range(comparison.seeds):
        for arm, base_arm, extra in arms:
            for rate in rates:
                chosen = () if rate is None else (f"optimizer.learning_rate={rate!r}",)
                runs.append(Run(arm, base_arm, seed, rate, (*overrides, *extra, *chosen, f"seed={seed}")))
    for run in runs:
        load_config(f"{comparison.path}:{run.base_arm}", run.overrides)
    return runs


def longer_runs(comparison: Comparison, runs: Sequence[Run], steps: int) -> list[Run]:
    """The first arm's runs again, as `<arm>_longer`, trained for `steps` steps."""
    first = comparison.arms[0]
    return [
        dataclasses.replace(run, arm=f"{first}_longer", overrides=(*run.overrides, f"training.steps={steps}"))
        for run in runs
        if run.arm == first
    ]


def resolved(comparison: Comparison, arm: str, overrides: Sequence[str]) -> Config:
    return load_config(f"{comparison.path}:{arm}", overrides)
