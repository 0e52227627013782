"""`python -m iha_jax.learned_tasks --config=configs/learned_tasks.py[:cpm3] --workdir=DIR`.

Trains MHA and IHA with several numbers of heads on the theorems' tasks, all seeds of a point side by side, and writes
`report.md`, `.csv` and `.png` into `DIR/<experiment>`. Run it again to go on where it stopped: finished points are not
run again. `--config.experiment.seeds=5` and the like change the experiment.
"""

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

if __name__ == "__main__":
    run(LEARNED_TASKS)
