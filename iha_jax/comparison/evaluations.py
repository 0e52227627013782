"""What `eval.py` found of the runs of a comparison, side by side."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from iha_jax.comparison.runs import Run
from iha_jax.comparison.statistics import Estimate, estimate, paired_difference
from iha_jax.comparison.table import Row
from iha_jax.data.storage import read_json
from iha_jax.training.run_directory import evaluation_file

NOTES = (
    "Evaluations: ± is the half-width of a 95 % Student-t interval over seeds; for one seed the interval over its "
    "samples stands in brackets; differences are to the first arm, paired by seed."
)


@dataclass(frozen=True)
class Cell:
    """A metric of one row of the comparison, and its difference from the first arm's where both have seeds."""

    value: Estimate
    over_samples: tuple[float, float] | None  # one seed
    difference: Estimate | None

    def text(self) -> str:
        if self.value.half_width is None:
            low_high = self.over_samples
            return f"{self.value.mean:.4f}" + (f" [{low_high[0]:.4f}, {low_high[1]:.4f}]" if low_high else "")
        shown = f"{self.value.mean:.4f} ± {self.value.half_width:.4f}"
        gap = self.difference
        return shown if gap is None or gap.half_width is None else f"{shown} ({gap.mean:+.4f} ± {gap.half_width:.4f})"


@dataclass(frozen=True)
class Evaluations:
    """`cells[task, metric][label]` of the rows that were evaluated at their last step, and what is not fair in them."""

    cells: dict[tuple[str, str], dict[str, Cell]]
    remarks: list[str]


def read_tasks(workdir: epath.PathLike, run: Run, step: int) -> dict[str, Any]:
    """What is written of each task of a run's step; empty when it was not evaluated.

    Raises:
      ValueError: for a results file that cannot be read.
    """
    path = evaluation_file(epath.Path(workdir) / run.folder, step)
    return read_json(path)["tasks"] if path.exists() else {}


def read_evaluations(workdir: epath.PathLike, rows: Sequence[Row]) -> Evaluations:
    """The metrics that have intervals, of every row, with the rows' own baselines."""
    found = {row.label: {r.run.seed: read_tasks(workdir, r.run, r.final["step"]) for r in row.results} for row in rows}
    names = {
        (task, metric): None
        for seeds in found.values()
        for tasks in seeds.values()
        for task, content in tasks.items()
        for metric in content["intervals"]
    }
    cells: dict[tuple[str, str], dict[str, Cell]] = {}
    for task, metric in names:
        values = {label: _values(seeds, task, metric) for label, seeds in found.items()}
        cells[task, metric] = {
            row.label: _cell(values[row.label], values.get(row.baseline), _intervals(found[row.label], task, metric))
            for row in rows
            if values[row.label]
        }
    return Evaluations(cells, _remarks(found))


def _values(seeds: Mapping[int, dict[str, Any]], task: str, metric: str) -> dict[int, float]:
    """By seed, of those that were evaluated and gave a number."""
    found = {seed: tasks[task].get(metric) for seed, tasks in seeds.items() if task in tasks}
    return {seed: value for seed, value in found.items() if value is not None}


def _intervals(seeds: Mapping[int, dict[str, Any]], task: str, metric: str) -> list[tuple[float, float]]:
    pairs = [tasks[task]["intervals"].get(metric) for tasks in seeds.values() if task in tasks]
    return [(pair[0], pair[1]) for pair in pairs if pair and None not in pair]


def _cell(
    values: dict[int, float], baseline: dict[int, float] | None, intervals: Sequence[tuple[float, float]]
) -> Cell:
    over_samples = intervals[0] if len(values) == 1 and intervals else None
    difference = paired_difference(values, baseline) if baseline else None
    return Cell(estimate(list(values.values())), over_samples, difference)


def _remarks(found: Mapping[str, Mapping[int, dict[str, Any]]]) -> list[str]:
    """Runs that lack a task which others have, and tasks that were not the same for all."""
    remarks = []
    for task in dict.fromkeys(t for seeds in found.values() for tasks in seeds.values() for t in tasks):
        lacking, settings = [], set()
        for label, seeds in found.items():
            for seed, tasks in seeds.items():
                if task in tasks:
                    settings.add(json.dumps(tasks[task]["settings"], sort_keys=True))
                else:
                    lacking.append(f"{label} seed {seed}")
        if lacking:
            remarks.append(f"Not evaluated on {task}: {', '.join(lacking)}.")
        if len(settings) > 1:
            differ = _differences([json.loads(text) for text in settings])
            remarks.append(f"UNFAIR: {task} was not run with the same settings everywhere: {differ} differ.")
    return remarks


def _differences(settings: Sequence[dict[str, Any]]) -> str:
    keys = dict.fromkeys(key for one in settings for key in one)
    return ", ".join(key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings))


def lines(evaluations: Evaluations, labels: Sequence[str]) -> list[list[str]]:
    """A table: a header, then a line a metric with a cell an arm."""
    header = ["task", "metric", *labels]
    return [header] + [
        [task, metric, *(cells[label].text() if label in cells else "-" for label in labels)]
        for (task, metric), cells in evaluations.cells.items()
    ]
