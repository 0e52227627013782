"""What an evaluation leaves: a JSON file of numbers, one JSONL file a task of its samples, a table on the terminal.

Without `--out` they go to `evaluations/` of the run directory, where `compare` finds them: `step_<N>.json` and
`step_<N>.<task>.jsonl`. Tasks evaluated later are added to the file of their step.
"""

import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from iha_jax.comparison.table import aligned
from iha_jax.data.storage import read_json, write_text
from iha_jax.evaluation.run import Restored
from iha_jax.evaluation.tasks import TaskResult
from iha_jax.training.run_directory import code_revision


def write_results(
    path: epath.Path, run: Restored, results: Mapping[str, TaskResult], flags: Sequence[str], *, add: bool
) -> None:
    """Writes the samples of each task beside `path`, and then `path`:

        {"step": N, "checkpoint_digest": ..., "tasks": {task: {metric: value, ...,
         "intervals": {metric: [low, high]}, "examples": {metric: n}, "samples": n, "settings": {...},
         "counts": {...}, "records": file name, "command": ..., "date": ..., "code": ..., "device": ...}, ...}}

    Numbers that are not finite are null. `add` keeps the other tasks of a file written for the same parameters.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {
        "command": shlex.join(["eval.py", *flags]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "code": code_revision(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    tasks = _tasks_of(path, run) if add else {}
    for name, result in results.items():
        records = path.with_name(f"{path.stem}.{name.replace(':', '_').replace('/', '_')}.jsonl")
        lines = (json.dumps(_finite(record), ensure_ascii=False) for record in result.records)
        write_text(records, "".join(f"{line}\n" for line in lines))
        tasks[name] = {
            **result.metrics,
            "intervals": result.intervals,
            "examples": result.examples,
            "samples": len(result.records),
            "settings": result.settings,
            "counts": result.counts,
            "records": records.name,
            **told,
        }
    content = {"step": run.step, "checkpoint_digest": run.digest, "tasks": tasks}
    write_text(path, json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n")


def _tasks_of(path: epath.Path, run: Restored) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = read_json(path)
    return dict(found["tasks"]) if found.get("checkpoint_digest") == run.digest else {}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(results: Mapping[str, TaskResult]) -> str:
    """A line a metric: task, metric, value, 95 % interval, examples; below it what happened on the way."""
    lines = [("task", "metric", "value", "95 % interval", "examples")]
    for name, result in results.items():
        for metric, value in result.metrics.items():
            low, high = result.intervals.get(metric, (math.nan, math.nan))
            interval = "" if math.isnan(low) else f"{low:.4f} to {high:.4f}"
            lines.append((name, metric, f"{value:.4f}", interval, str(result.examples.get(metric, ""))))
    counts = [
        f"{task}: {name.replace('_', ' ')}: {found}"
        for task, result in results.items()
        for name, found in result.counts.items()
        if found
    ]
    return "\n".join([aligned(lines, texts=2), *counts])
