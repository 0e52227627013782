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
    """What a config file's `get_comparison()` asks for. Every arm is compared with the first.

    Controls spend on the first arm what the last arm costs more: "widened" gives it a wider MLP, "longer" more steps.
    """

    path: str
    arms: tuple[str, ...]
    seeds: int
    learning_rates: tuple[float, ...]
    controls: tuple[str, ...]

    @property
    def widened(self) -> str:
        return f"{self.arms[0]}_widened"

    @property
    def longer(self) -> str:
        return f"{self.arms[0]}_longer"


@dataclass(frozen=True)
class Run:
    """One run of a comparison: an arm, perhaps at a learning rate of its own, with a seed."""

    arm: str
    base_arm: str
    seed: int
    learning_rate: float | None
    overrides: tuple[str, ...]

    @property
    def setting(self) -> str:
        """The arm, and its learning rate where there are several: what the seeds of a row have in common."""
        return self.arm + ("" if self.learning_rate is None else f" lr {self.learning_rate:g}")

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
    known = [field.name for field in dataclasses.fields(Comparison) if field.name != "path"]
    problems = [f"comparison.{key}: no such key; valid keys: {', '.join(known)}" for key in values if key not in known]
    problems += [f"comparison.{key} is missing" for key in known if key not in values]
    for key in ("arms", "learning_rates", "controls"):
        if not isinstance(values.get(key, ()), tuple | list):
            problems.append(f"comparison.{key} = {values[key]!r}: expected a tuple")
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
    arms, rates = values["arms"], values["learning_rates"]
    if not arms or len(set(arms)) != len(arms) or not set(arms) <= set(known_arms):
        expected = f"different ones of ARMS: {', '.join(known_arms)}" if known_arms else "the file to define ARMS"
        problems.append(f"comparison.arms = {arms!r}: expected {expected}")
    if isinstance(values["seeds"], bool) or not isinstance(values["seeds"], int) or values["seeds"] < 1:
        problems.append(f"comparison.seeds = {values['seeds']!r}: expected a positive number of seeds")
    wrong = [r for r in rates if isinstance(r, bool) or not isinstance(r, int | float) or not 0 < r < 1e3]
    problems += [f"comparison.learning_rates has {rate!r}: expected positive numbers" for rate in wrong]
    if not wrong and len({f"{rate:g}" for rate in rates}) != len(rates):
        problems.append(f"comparison.learning_rates = {rates!r}: expected different ones, in 6 digits")
    for control in values["controls"]:
        if control not in CONTROLS:
            problems.append(f"comparison.controls has {control!r}: expected some of {', '.join(CONTROLS)}")
        elif arms and f"{arms[0]}_{control}" in arms:
            problems.append(f"comparison.controls has {control!r}: {arms[0]}_{control} is an arm of the file already")
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

    Raises:
      ConfigError: every config is resolved here, so that a bad one is refused before the first run starts.
    """
    _check_overrides(comparison, overrides)
    arms: list[tuple[str, str, tuple[str, ...]]] = [(arm, arm, ()) for arm in comparison.arms]
    if "widened" in comparison.controls:
        first, last = (resolved(comparison, arm, overrides).model for arm in (comparison.arms[0], comparison.arms[-1]))
        width = widened_mlp(first, last)
        if width > first.mlp_width:  # else the control would be the first arm again
            arms.append((comparison.widened, comparison.arms[0], (f"model.mlp_width={width}",)))
    rates = comparison.learning_rates or (None,)
    runs = []
    for seed in range(comparison.seeds):
        for arm, base_arm, extra in arms:
            for rate in rates:
                chosen = () if rate is None else (f"optimizer.learning_rate={rate!r}",)
                runs.append(Run(arm, base_arm, seed, rate, (*overrides, *extra, *chosen, f"seed={seed}")))
    for run in runs:
        run_config(comparison, run)
    return runs


def _check_overrides(comparison: Comparison, overrides: Sequence[str]) -> None:
    names = [override.partition("=")[0] for override in overrides]
    problems = []
    if "seed" in names:
        problems.append("--config.seed: a comparison sets the seed of each run; comparison.seeds says how many")
    if comparison.learning_rates and "optimizer.learning_rate" in names:
        problems.append("--config.optimizer.learning_rate: comparison.learning_rates sets it for each run")
    if problems:
        raise ConfigError(problems)


def longer_runs(comparison: Comparison, runs: Sequence[Run], steps: int | None = None) -> list[Run]:
    """The first arm's runs again, as `<arm>_longer`, trained for `steps` steps (None: not known yet)."""
    first = comparison.arms[0]
    extra = () if steps is None else (f"training.steps={steps}",)
    return [
        dataclasses.replace(run, arm=comparison.longer, overrides=(*run.overrides, *extra))
        for run in runs
        if run.arm == first
    ]


def resolved(comparison: Comparison, arm: str, overrides: Sequence[str]) -> Config:
    return load_config(f"{comparison.path}:{arm}", overrides)


def run_config(comparison: Comparison, run: Run) -> Config:
    """The config that `run` trains."""
    return resolved(comparison, run.base_arm, run.overrides)
