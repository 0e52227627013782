"""Three learning rates for MHA and IHA each, on a laptop's CPU: is one of the two better tuned than the other?

    python -m iha_jax.sweep --config=configs/learning_rate_sweep.py --workdir=runs/rates
    python -m iha_jax.compare --config=configs/learning_rate_sweep.py --workdir=runs/rates --report_only

The models are those of configs/quickstart.py, one seed each: enough to choose a rate, not to say who wins. Losses seen
are in docs/log.md. On a cluster, one task a point: `--index=$SLURM_ARRAY_TASK_ID` (launch/sweep.sbatch). `--dry_run`
prints the six commands.
"""

from configs.quickstart import ARMS, get_config
from iha_jax.overrides import Override, grid

__all__ = ["ARMS", "get_config", "get_sweep"]


def get_sweep() -> list[Override]:
    return grid({"arm": ARMS, "optimizer.learning_rate": (3e-3, 7e-3, 1.5e-2)})
