"""Reading run directories back: what each run of a comparison was, and how it went."""

import json
import statistics
from dataclasses import dataclass
from typing import Any

from etils import epath

from iha_jax.config import Config
from iha_jax.training.metrics import FILE, read_metrics
from iha_jax.training.run_directory import CONFIG, PROVENANCE, load_run_config


@dataclass(frozen=True)
class Result:
    """One run directory. `arm` and `learning_rate` come from its place, everything else from its files."""

    arm: str
    seed: int
    learning_rate: float | None
    config: Config
    train: list[dict[str, Any]]
    val: list[dict[str, Any]]
    provenance: dict[str, Any]

    @property
    def finished(self) -> bool:
        return bool(self.val) and self.val[-1]["step"] == self.config.training.steps

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


def is_finished(directory: epath.PathLike) -> bool:
    """Whether the run in `directory` has its last validation row."""
    directory = epath.Path(directory)
    if not (directory / CONFIG).exists():
        return False
    steps = load_run_config(str(directory)).training.steps
    rows = [row for row in read_metrics(directory / FILE) if row["split"] == "val"]
    return bool(rows) and rows[-1]["step"] == steps


def read_results(workdir: epath.PathLike) -> list[Result]:
    """Every run under `workdir/<arm>/seed<k>` and `workdir/<arm>/lr<x>/seed<k>`, finished or not, in name order."""
    results = []
    for arm in sorted(path for path in epath.Path(workdir).iterdir() if path.is_dir() and path.name[0] != "."):
        for place in [arm, *sorted(path for path in arm.glob("lr*") if path.is_dir())]:
            rate = None if place == arm else float(place.name.removeprefix("lr"))
            for run in sorted(place.glob("seed*"), key=lambda path: int(path.name.removeprefix("seed"))):
                if (run / CONFIG).exists():
                    results.append(_read(arm.name, rate, run))
    return results


def _read(arm: str, rate: float | None, directory: epath.Path) -> Result:
    rows = read_metrics(directory / FILE)
    by_split = {split: [row for row in rows if row["split"] == split] for split in ("train", "val")}
    provenance = directory / PROVENANCE
    return Result(
        arm=arm,
        seed=int(directory.name.removeprefix("seed")),
        learning_rate=rate,
        config=load_run_config(str(directory)),
        train=by_split["train"],
        val=by_split["val"],
        provenance=json.loads(provenance.read_text()) if provenance.exists() else {},
    )
