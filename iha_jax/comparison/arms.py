"""The arms of a comparison: those the config file names, and control arms derived from them by rule."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iha_jax.accounting import flops_per_token
from iha_jax.comparison.runs import Run, plan_runs, sweep_points
from iha_jax.config import ConfigError, ModelConfig
from iha_jax.config_file import default_arm, load_config, load_module
from iha_jax.overrides import Override, grid

KEYS = ("arms", "seeds", "learning_rates", "controls")  # of get_comparison()
CONTROLS = ("widened", "longer")


@dataclass(frozen=True)
class Comparison:
    """What a config file's `get_comparison()` asks for. Every arm is compared with the first.

    Controls spend on the first arm what the last arm costs more: "widened" gives it a wider MLP, "longer" more steps.
    """

    path: str
    arms: tuple[str, ...]
    points: tuple[Override, ...]
    controls: tuple[str, ...]

    @property
    def widened(self) -> str:
        return f"{self.arms[0]}_widened"

    @property
    def longer(self) -> str:
        return f"{self.arms[0]}_longer"


def load_comparison(path: str) -> Comparison:
    """Reads and checks `get_comparison()` of a config file; without one, `get_sweep()` is compared, arm by arm.

    Raises:
      ConfigError: with every problem.
    """
    if ":" in path:
        raise ConfigError([f"--config={path}: name the file alone; it says which arms run"])
    module = load_module(path)
    if not hasattr(module, "get_comparison"):
        if not hasattr(module, "get_sweep"):
            raise ConfigError([f"--config={path}: the file defines no get_comparison() and no get_sweep()"])
        points = sweep_points(path)
        arms = dict.fromkeys(str(point.get("arm", default_arm(path))) for point in points)
        return Comparison(path, tuple(arms), tuple(points), ())
    values = module.get_comparison()
    values = values.to_dict() if hasattr(values, "to_dict") else dict(values)
    problems = [f"comparison.{key}: no such key; valid keys: {', '.join(KEYS)}" for key in values if key not in KEYS]
    problems += [f"comparison.{key} is missing" for key in KEYS if key not in values]
    for key in ("arms", "learning_rates", "controls"):
        if not isinstance(values.get(key, ()), tuple | list):
            problems.append(f"comparison.{key} = {values[key]!r}: expected a tuple")
    if not problems:
        problems = _check_values(values, tuple(getattr(module, "ARMS", ())))
    if problems:
        raise ConfigError(problems)
    axes: dict[str, Sequence[Any]] = {"seed": range(values["seeds"]), "arm": values["arms"]}  # seed 0 of each arm first
    if values["learning_rates"]:
        axes["optimizer.learning_rate"] = [float(rate) for rate in values["learning_rates"]]
    return Comparison(path, tuple(values["arms"]), tuple(grid(axes)), tuple(values["controls"]))


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
      ConfigError: as `plan_runs` does, before the first run starts.
    """
    runs = plan_runs(comparison.path, comparison.points, overrides)
    if "widened" in comparison.controls:
        ends = (comparison.arms[0], comparison.arms[-1])
        first, last = (load_config(f"{comparison.path}:{arm}", overrides).model for arm in ends)
        width = widened_mlp(first, last)
        if width > first.mlp_width:  # else the control would be the first arm again
            runs += _controls(runs, comparison.arms[0], comparison.widened, f"model.mlp_width={width}")
            runs.sort(key=lambda run: run.seed)
    for run in runs:
        run.config()
    return runs


def longer_runs(comparison: Comparison, runs: Sequence[Run], steps: int | None = None) -> list[Run]:
    """The first arm's runs again, as `<arm>_longer`, trained for `steps` steps (None: not known yet)."""
    extra = () if steps is None else (f"training.steps={steps}",)
    return _controls(runs, comparison.arms[0], comparison.longer, *extra)


def _controls(runs: Sequence[Run], arm: str, name: str, *extra: str) -> list[Run]:
    """The runs of `arm` again under another name, with more overrides."""
    return [dataclasses.replace(run, arm=name, overrides=(*run.overrides, *extra)) for run in runs if run.arm == arm]
