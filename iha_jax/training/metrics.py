"""`metrics.jsonl`, always; TensorBoard and Weights & Biases where installed and asked for."""

import json
import math
import os
import secrets
import tempfile
from typing import Any, Self

from etils import epath

from iha_jax.data.storage import is_local
from iha_jax.parallel.processes import is_first, of_first
from iha_jax.training.staging import Staging

FILE = "metrics.jsonl"


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line torn by a kill is left out. Raises ValueError for other bad lines."""
    path, rows = epath.Path(path), []
    if not path.exists():
        return rows
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: the write was cut off
                break
            raise ValueError(f"{path}, line {number}: not a JSON object: {error}") from error
    return rows


class MetricsWriter:
    """Appends rows, one flat JSON object a line, flushed each time. Numbers that are not finite become null.

    On resume (`resume_step` not None) rows after that step are dropped; on a new start all are. Only process 0 writes.
    In a bucket the file is replaced now and then by a longer one (`Staging`); after `flush` it has every row.
    """

    def __init__(
        self, directory: epath.PathLike, *, resume_step: int | None, tensorboard: bool = False, wandb_project: str = ""
    ):
        path = epath.Path(directory) / FILE
        self._active = is_first()
        kept = read_metrics(path) if resume_step is not None else []
        self._sinks: list[Any] = []
        if self._active:
            self._staging = Staging(directory, resume=resume_step is not None)
            left = read_metrics(self._staging.folder / FILE) if resume_step is not None else []
            if left[: len(kept)] == kept:  # in a bucket: a crash left rows here that never reached it
                kept = left
        self._rows = [row for row in kept if row["step"] <= (resume_step or 0)]
        if self._active:
            self._open(self._staging.folder / FILE)
            if tensorboard:
                self._sinks.append(_TensorBoard(self._staging.folder / "tensorboard"))
            if wandb_project:
                self._sinks.append(_Wandb(epath.Path(directory), wandb_project))

    def _open(self, path: epath.Path) -> None:
        scratch = path.parent / f"{FILE}.tmp"
        scratch.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        scratch.replace(path)
        self._file = open(os.fspath(path), "a", encoding="utf-8")  # noqa: SIM115  closed in __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()
        if self._active:
            self._file.close()
            self._staging.close()

    def write(self, row: dict[str, Any]) -> None:
        row = {name: _finite(value) for name, value in row.items()}
        self._rows.append(row)
        for sink in self._sinks:
            sink.write(row)
        if self._active:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            self._staging.offer()

    def flush(self) -> None:
        """Returns when the run directory has every row. Call it before a checkpoint is saved: a run that resumes there
        must not lack the rows before it."""
        for sink in self._sinks:
            sink.flush()
        if self._active:
            self._staging.flush()

    def training_losses(self) -> list[float | None]:
        """The losses of all `train` rows as process 0 has them, rows of before a resume included; None: not finite."""
        return of_first([row["loss"] for row in self._rows if row["split"] == "train"])

    def has_validation(self, step: int) -> bool:
        """Whether process 0 has the `val` row of a step, rows of before a resume included."""
        return of_first(any(row["split"] == "val" and row["step"] == step for row in self._rows))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_sinks(tensorboard: bool, wandb_project: str) -> None:
    """Raises ValueError, naming the extra to install, when a sink is asked for whose library is missing."""
    import importlib.util

    for asked, library, extra in ((tensorboard, "tensorboardX", "tensorboard"), (wandb_project, "wandb", "wandb")):
        if asked and importlib.util.find_spec(library) is None:
            raise ValueError(
                f"config.training asks for {extra}, which is not installed: pip install 'iha_jax[{extra}]'"
            )


class _TensorBoard:
    def __init__(self, directory: epath.Path):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(os.fspath(directory))

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(f"{row['split']}/{name}", value, row["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, directory: epath.Path, project: str):
        import wandb  # type: ignore[import-not-found]  an optional extra

        # One wandb run for one run directory, however often it is resumed.
        id_file = directory / "wandb_id.txt"
        run_id = id_file.read_text() if id_file.exists() else secrets.token_hex(8)
        id_file.write_text(run_id)
        # Its own files are its own to upload: beside a bucket they need only lie somewhere.
        folder = os.fspath(directory) if is_local(directory) else tempfile.gettempdir()
        self._run = wandb.init(project=project, dir=folder, name=directory.name, id=run_id, resume="allow")

    def write(self, row: dict[str, Any]) -> None:
        values = {f"{row['split']}/{k}": v for k, v in row.items() if k not in ("step", "split") and v is not None}
        self._run.log(values, step=row["step"])

    def flush(self) -> None:
        pass  # wandb uploads by itself

    def close(self) -> None:
        self._run.finish()
