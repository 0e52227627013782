"""`python -m iha_jax.compare --config=configs/quickstart.py --workdir=DIR [--report_only] [--config.a.b=value ...]`.

Trains every arm and seed of a comparison config that is not finished yet, each in a process of its own, and writes
`comparison.md`, `comparison.csv` and `comparison.png`. Run it again to go on where it stopped.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from etils import epath

from iha_jax.comparison.arms import Comparison, Run, load_comparison, longer_runs, longer_steps, planned_runs
from iha_jax.comparison.figure import draw
from iha_jax.comparison.results import Result, is_finished, read_results
from iha_jax.comparison.table import best_of, csv_text, make_rows, markdown_table, terminal_table, verdict
from iha_jax.training.command import refuse, split_overrides

Launch = Callable[[list[str], dict[str, str]], int]


def launch(command: list[str], environment: dict[str, str]) -> int:
    """Runs a command to its end, passing on SIGTERM and SIGINT; returns its exit code."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    before = {
        s: signal.signal(s, lambda number, _: process.send_signal(number)) for s in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_all(comparison: Comparison, workdir: str, runs: Sequence[Run], launch: Launch = launch) -> int:
    """Runs what is not finished, in order; returns 0, or the exit code of the first run that did not end well."""
    waiting = [run for run in runs if not is_finished(epath.Path(workdir) / run.folder)]
    if len(waiting) < len(runs):
        _say(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already")
    cache = str((epath.Path(workdir) / ".jax_cache").resolve())
    environment = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | os.environ
    began = time.monotonic()
    for number, run in enumerate(waiting, 1):
        _say(f"run {number} of {len(waiting)}: {run.folder}")
        command = [sys.executable, "-m", "iha_jax.training", f"--config={comparison.path}:{run.base_arm}"]
        command += [f"--workdir={epath.Path(workdir) / run.folder}", *(f"--config.{o}" for o in run.overrides)]
        code = launch(command, environment)
        if code:
            _say(f"{run.folder} ended with exit code {code}. The same command goes on from there; that run alone:")
            _say("  " + " ".join(command))
            return code if code > 0 else 128 - code
        elapsed = time.monotonic() - began
        left = elapsed / number * (len(waiting) - number)
        _say(f"finished {run.folder}; {elapsed:.0f} s so far, about {left:.0f} s left")
    return 0


def report(comparison: Comparison, workdir: str) -> str:
    """Writes the three files from the run directories alone, and returns the table and its sentences as text.

    Raises:
      ValueError: when no run under `workdir` is finished.
    """
    results = read_results(workdir) if epath.Path(workdir).is_dir() else []
    rows = make_rows(results, comparison.arms)
    if not rows:
        raise ValueError(f"--workdir={workdir}: no finished run to report")
    best = best_of(rows, comparison.arms) if any(r.learning_rate is not None for r in results) else None
    unfinished = [_place(r) for r in results if not r.finished]
    sentences = verdict(rows if best is None else best)
    if unfinished:
        sentences.append("Not finished, and left out: " + ", ".join(unfinished) + ".")
    notes = (
        "FLOPs are useful forward FLOPs a token (visible pairs only); training costs three times as much. Losses are "
        "final validation losses in nats a token, bits are per UTF-8 byte; ± is a 95 % Student-t interval over n "
        "seeds; differences are in bits per byte, paired by seed, to the first arm."
    )
    device = rows[0].results[0].provenance.get("runs", [{}])[-1]
    where = f"Device: {device.get('device_count')} x {device.get('device_kind')}, started {device.get('started')}."
    sections = [("Same setting" if best else "", rows)] + ([("Best of its learning rates", best)] if best else [])
    text, markdown = "", "# Comparison\n\n![loss curves](comparison.png)\n"
    for title, section in sections:
        text += (f"\n{title}\n" if title else "\n") + terminal_table(section) + "\n"
        markdown += (f"\n## {title}\n" if title else "") + "\n" + markdown_table(section) + "\n"
    folder = epath.Path(workdir)
    (folder / "comparison.md").write_text(
        markdown + "\n" + "\n".join(f"- {s}" for s in sentences) + f"\n\n{notes}\n{where}\n"
    )
    (folder / "comparison.csv").write_text(csv_text(results))
    draw(rows if best is None else best, folder / "comparison.png")
    return text + "\n" + "\n".join(sentences) + f"\n\n{notes}\n\nwrote {folder}/comparison.md, .csv and .png"


def _place(result: Result) -> str:
    rate = "" if result.learning_rate is None else f"/lr{result.learning_rate:g}"
    return f"{result.arm}{rate}/seed{result.seed}"


def _longer(comparison: Comparison, workdir: str, runs: Sequence[Run]) -> list[Run]:
    """The runs of the `longer` control, their length measured from the finished first and last arms."""
    seconds: dict[str, list[float]] = {}
    steps = 0
    for result in read_results(workdir):
        if result.finished:
            seconds.setdefault(result.arm, []).append(result.seconds_per_step)
            steps = result.config.training.steps if result.arm == comparison.arms[-1] else steps
    first, last = (sorted(seconds[arm])[len(seconds[arm]) // 2] for arm in (comparison.arms[0], comparison.arms[-1]))
    return longer_runs(comparison, runs, longer_steps(steps, first, last))


def _say(text: str) -> None:
    print(f"[compare] {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 75 preempted (run it again), 2 refused input, else a run's failure."""
    overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m iha_jax.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, help="a config file with get_comparison()")
    parser.add_argument("--workdir", required=True, help="runs go to WORKDIR/<arm>/seed<k>")
    parser.add_argument("--report_only", action="store_true", help="train nothing, rebuild the report")
    flags = parser.parse_args(rest)
    try:
        comparison = load_comparison(flags.config)
        if epath.Path(flags.workdir).exists() and not epath.Path(flags.workdir).is_dir():
            raise ValueError(f"--workdir={flags.workdir}: is a file; expected a directory")
        runs = planned_runs(comparison, overrides)
        if flags.report_only:
            print(report(comparison, flags.workdir))
            sys.exit(0)
    except ValueError as error:
        refuse(error)
    code = run_all(comparison, flags.workdir, runs)
    if not code and "longer" in comparison.controls:
        code = run_all(comparison, flags.workdir, _longer(comparison, flags.workdir, runs))
    if code:
        sys.exit(code)
    print(report(comparison, flags.workdir))
    sys.exit(0)


if __name__ == "__main__":
    main()
