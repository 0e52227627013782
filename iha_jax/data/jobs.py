"""Work cut into jobs: over processes, with progress, and resumable where each job leaves its facts in a file."""

import concurrent.futures
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from etils import epath
from tqdm import tqdm

from iha_jax.data.storage import files_in, write_text

Facts = dict[str, Any]
_SECONDS_BETWEEN_LINES = 10


def run_jobs(
    function: Callable[..., Facts],
    jobs: Sequence[tuple[Any, ...]],
    folder: epath.Path,
    *,
    workers: int,
    label: str,
    stream: TextIO | None = None,
) -> Iterator[Facts]:
    """`function(*job)` of every job, in order. A job whose facts are in `folder` (one JSON file each) is not run again.

    At most `workers` processes; with one, or one job left to do, this process. What a job raises is raised here, and no
    other job is begun. Progress goes to `stream` (stderr): a bar on a terminal, else a line every ten seconds.
    """
    names = [f"{i:05d}.json" for i in range(len(jobs))]
    there = files_in(folder)
    done = {name: json.loads((folder / name).read_text()) for name in names if name in there}
    left = [(function, job, folder / name) for job, name in zip(jobs, names, strict=True) if name not in done]
    folder.mkdir(parents=True, exist_ok=True)
    progress = _Progress(label, len(jobs), len(done), stream or sys.stderr)
    try:
        results = _spread(left, min(workers, len(left)), progress)
        for name in names:
            yield done[name] if name in done else next(results)
    finally:
        progress.close()


def _spread(left: list[tuple[Any, ...]], workers: int, progress: "_Progress") -> Iterator[Facts]:
    if workers <= 1:
        for job in left:
            facts = _run(*job)
            progress.add()
            yield facts
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        futures = [pool.submit(_run, *job) for job in left]
        for future in futures:
            future.add_done_callback(lambda _: progress.add())
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(function: Callable[..., Facts], job: tuple[Any, ...], path: epath.Path) -> Facts:
    facts = function(*job)
    write_text(path, json.dumps(facts))
    return facts


def _begin_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, and they would wait for it for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


class _Progress:
    def __init__(self, label: str, total: int, before: int, stream: TextIO):
        self._label, self._total, self._before, self._done, self._stream = label, total, before, before, stream
        self._began = self._said = time.monotonic()
        self._bar = None
        if stream.isatty():
            self._bar = tqdm(total=total, initial=before, desc=label, unit="shard", file=stream, dynamic_ncols=True)
        elif before:
            print(f"{label}: {before} of {total} shards are there already", file=stream, flush=True)

    def add(self) -> None:
        self._done += 1
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update()
        elif self._done == self._total or now - self._said > _SECONDS_BETWEEN_LINES:
            left = (now - self._began) / (self._done - self._before) * (self._total - self._done)
            line = f"{self._label}: {self._done} of {self._total} shards, {left:.0f} s left"
            print(line, file=self._stream, flush=True)
            self._said = now

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
