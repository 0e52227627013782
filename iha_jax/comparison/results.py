"""Reading run directories back: what each run of a comparison was, and how it went."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from iha_jax.comparison.runs import Run
from iha_jax.config import Config
from iha_jax.training.metrics import FILE, read_metrics
from iha_jax.training.run_directory import CONFIG, PROVENANCE, load_run_config

# What a report reads of each row of metrics.jsonl, by split.
NEEDED = {
    "train": ("step", "seconds", "tokens_per_second"),
    "val": ("step", "loss", "bits_per_byte", "tokens", "flops", "seconds", "peak_memory_bytes"),
}


@dataclass(frozen=True)
class Result:
    """One run directory: which run of the comparison it is, and what its files say."""

    run: Run
    config: Config
    train: list[dict[str, Any]]
    val: list[dict[str, Any]]
    provenance: dict[str, Any]

    @property
    def finished(self) -> bool:
        return bool(self.train and self.val) and self.val[-1]["step"] == self.config.training.steps

    @property
    def diverged(self) -> bool:
        """Whether the last validation loss is no number (it is null in the file): there is nothing to average."""
        return bool(self.val) and self.val[-1]["loss"] is None

    @property
    def final(self) -> dict[str, Any]:
        return self.val[-1]

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(row["tokens_per_second"] for row in self.train)

    @property
    def seconds_per_step(self) -> float:
        last = self.train[-1]
        return last["seconds"] / last["step"]

    @property
    def starts(self) -> list[dict[str, Any]]:
        """What each start of the run noted: device, code, versions."""
        return self.provenance.get("runs", [])


@dataclass(frozen=True)
class Found:
    """What lies under a comparison's workdir: its runs, in the order asked for, and what is not one of them."""

    results: list[Result]
    missing: list[str]
    unreadable: list[str]
    foreign: list[str]

    @property
    def usable(self) -> list[Result]:
        """The finished runs that ended with a number."""
        return [result for result in self.results if result.finished and not result.diverged]


def is_finished(directory: epath.PathLike) -> bool:
    """Whether the run in `directory` has its last validation row."""
    directory = epath.Path(directory)
    if not (directory / CONFIG).exists():
        return False
    steps = load_run_config(str(directory)).training.steps
    rows = [row for row in read_metrics(directory / FILE) if row["split"] == "val"]
    return bool(rows) and rows[-1]["step"] == steps


def read_results(workdir: epath.PathLike, runs: Sequence[Run]) -> Found:
    """Reads each of `runs` from its directory under `workdir`, finished or not."""
    workdir = epath.Path(workdir)
    found = Found([], [], [], [])
    if not workdir.is_dir():
        return found
    for run in runs:
        if not (workdir / run.folder / CONFIG).exists():
            found.missing.append(run.folder)
            continue
        try:
            found.results.append(_read(run, workdir / run.folder))
        except (ValueError, OSError) as error:  # not this project's files, or torn ones
            found.unreadable.append(f"{run.folder} ({str(error).splitlines()[0]})")
    found.foreign.extend(_foreign(workdir, {tuple(run.folder.split("/")) for run in runs}))
    return found


def _foreign(folder: epath.Path, planned: set[tuple[str, ...]], above: tuple[str, ...] = ()) -> Iterator[str]:
    """Directories that neither are nor lead to a run of the comparison."""
    for child in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        parts = (*above, child.name)
        if parts in planned:
            continue
        if any(run[: len(parts)] == parts for run in planned):
            yield from _foreign(child, planned, parts)
        else:
            yield "/".join(parts)


def _read(run: Run, directory: epath.Path) -> Result:
    rows = read_metrics(directory / FILE)
    by_split: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for row in rows:
        split = str(row.get("split")) if isinstance(row, dict) else ""
        lacking = [name for name in NEEDED.get(split, ("split",)) if name not in row]
        if lacking:
            raise ValueError(f"{FILE} has a row without {', '.join(lacking)}")
        by_split[split].append(row)
    path = directory / PROVENANCE
    provenance = json.loads(path.read_text()) if path.exists() else {}
    if not isinstance(provenance, dict):
        raise ValueError(f"{PROVENANCE} is not a JSON object")
    config = load_run_config(str(directory))
    return Result(run=run, config=config, train=by_split["train"], val=by_split["val"], provenance=provenance)
