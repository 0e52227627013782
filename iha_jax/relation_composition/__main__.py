"""`python -m iha_jax.relation_composition --config=configs/relation_composition.py[:reduced] --workdir=DIR`.

Trains every arm of an experiment at every learning rate, all seeds of one side by side, and writes `report.md`, `.csv`
and `.png` into `DIR/<experiment>`. Run it again to go on where it stopped: finished points are not run again.
`--config.experiment.seeds=10` and the like change the experiment, `--config.model.width=64` the model of all arms.
"""

from collections.abc import Sequence
from typing import NoReturn

from iha_jax.relation_composition.command import Kind, run
from iha_jax.relation_composition.experiment import examples, load_points
from iha_jax.relation_composition.report import report

RELATION_COMPOSITION = Kind(
    "relation_composition", __doc__ or "", "<arm>/learning_rate=<r>", load_points, examples, report
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 75 preempted and saved (run it again), 2 refused input."""
    run(RELATION_COMPOSITION, arguments)


if __name__ == "__main__":
    main()
