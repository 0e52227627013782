"""`python -m iha_jax.learned_tasks --config=configs/learned_tasks.py[:cpm3] --workdir=DIR`.

Trains MHA and IHA with several numbers of heads on the theorems' tasks, all seeds of a point side by side, and writes
`report.md`, `.csv` and `.png` into `DIR/<experiment>`. Run it again to go on where it stopped: finished points are not
run again. `--config.experiment.seeds=5` and the like change the experiment.
"""

from collections.abc import Sequence
from typing import NoReturn

from iha_jax.learned_tasks.load import load_points
from iha_jax.learned_tasks.report import report
from iha_jax.relation_composition.command import Kind, run

LEARNED_TASKS = Kind(
    "learned_tasks",
    __doc__ or "",
    "<mechanism>/heads=<H>/learning_rate=<r>",
    load_points,
    lambda experiment: experiment.examples(),
    report,
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 75 preempted and saved (run it again), 2 refused input."""
    run(LEARNED_TASKS, arguments)


if __name__ == "__main__":
    main()
