"""The runs of a sweep or a comparison: an override each, checked, with a name that is also its directory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from iha_jax.config import Config, ConfigError
from iha_jax.config_file import default_arm, load_config, load_module
from iha_jax.overrides import Override, as_text, run_folder, settings_name


@dataclass(frozen=True)
class Run:
    """One run: an arm of a config file, perhaps with settings of its own, and a seed.

    `base_arm` is the file's arm that is trained; `arm` is another name where a control was made of it.
    """

    path: str
    arm: str
    base_arm: str
    seed: int
    settings: tuple[tuple[str, Any], ...]
    overrides: tuple[str, ...]

    @property
    def setting(self) -> str:
        """The arm and its settings: what the seeds of a row have in common."""
        return " ".join(part for part in (self.arm, settings_name(dict(self.settings))) if part) or "run"

    @property
    def learning_rate(self) -> float | None:
        """The learning rate that its settings name."""
        rate = dict(self.settings).get("optimizer.learning_rate")
        return None if rate is None else float(rate)

    @property
    def folder(self) -> str:
        return run_folder(self.arm, dict(self.settings), self.seed)

    @property
    def spec(self) -> str:
        """Its `--config`."""
        return f"{self.path}:{self.base_arm}" if self.base_arm else self.path

    def config(self) -> Config:
        """The config that the run trains."""
        return load_config(self.spec, self.overrides)

    def flags(self, workdir: str) -> list[str]:
        """The flags of `train.py` for this run, in its directory under `workdir`."""
        directory = epath.Path(workdir) / self.folder
        return [f"--config={self.spec}", f"--workdir={directory}", *(f"--config.{o}" for o in self.overrides)]


def sweep_points(path: str) -> list[Override]:
    """What `get_sweep()` of a config file returns. Raises ConfigError when that is no list of overrides."""
    try:
        points = load_module(path).get_sweep()
    except ValueError as error:
        raise ConfigError([f"--config={path}: {error}"]) from error
    if not isinstance(points, Sequence) or not all(isinstance(point, Mapping) for point in points):
        raise ConfigError([f"--config={path}: get_sweep() returns {points!r:.80}; expected a list of dictionaries"])
    if not points:
        raise ConfigError([f"--config={path}: get_sweep() returns no points"])
    return [dict(point) for point in points]


def plan_runs(path: str, points: Sequence[Override], overrides: Sequence[str], arm: str = "") -> list[Run]:
    """A run a point, all with `overrides`; points that name no arm have `arm`, or the file's default.

    Raises:
      ConfigError: for keys that do not exist, values that cannot be used, points that train the same, and keys set
        twice. Every config is resolved here, so that a bad one is refused before the first run starts.
    """
    problems = _set_twice(points, overrides, arm)
    if problems:
        raise ConfigError(problems)
    arm = arm or default_arm(path)
    runs: list[Run] = []
    found: dict[str, list[int]] = {}  # problem: the points that have it
    seen: dict[Any, int] = {}
    for number, point in enumerate(points):
        try:
            run, config = _make_run(path, point, overrides, arm)
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(number)
            continue
        runs.append(run)
        for same in (run.folder, (run.arm, config)):
            first = seen.setdefault(same, number)
            if first != number:
                found.setdefault(f"trains the same as point {first}: {point!r}", []).append(number)
                break
    if found:
        raise ConfigError([f"{_listed(numbers)}: {problem}" for problem, numbers in found.items()])
    return runs


def _make_run(path: str, point: Override, overrides: Sequence[str], default: str) -> tuple[Run, Config]:
    arm = str(point.get("arm", default))
    settings = tuple(sorted((key, value) for key, value in point.items() if key not in ("arm", "seed")))
    texts = [f"{key}={as_text(value)}" for key, value in point.items() if key != "arm"]
    config = load_config(f"{path}:{arm}" if arm else path, (*overrides, *texts))
    return Run(path, arm, arm, config.seed, settings, (*overrides, *texts)), config


def _set_twice(points: Sequence[Override], overrides: Sequence[str], arm: str) -> list[str]:
    swept = {key for point in points for key in point}
    names = dict.fromkeys(override.partition("=")[0] for override in overrides)
    problems = [f"--config.{name}: is set for each run by the config file" for name in names if name in swept]
    if arm and "arm" in swept:
        problems.append(f"--config=...:{arm}: the arm is set for each run by the config file; name the file alone")
    return problems


def _listed(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"point {numbers[0]}"
    return (
        f"points {numbers[0]} and {numbers[1]}"
        if len(numbers) == 2
        else f"{len(numbers)} points, the first {numbers[0]}"
    )
