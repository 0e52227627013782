"""Loss against size and compute: MHA, sliding windows and IHA at four sizes, three seeds, on a laptop's CPU.

    python -m iha_jax.compare --config=configs/scaling_cpu.py --workdir=runs/scaling

trains the quickstart's models at widths 32 to 80, each on about 1.5 tokens a parameter, and fits a power law to each
arm and seed. Several cores or machines share the work with `python -m iha_jax.sweep` and its `--index` (`compare
--report_only` then makes the table). The learning rate falls with 1 / width from the quickstart's, as is usual for
Adam; it was tuned for neither arm nor size. `windows` has IHA's pattern of layers, a window of 4 tokens in four of
five, and mixes nothing: what IHA gains over it is not the windows'. Times and losses seen are in docs/log.md.
"""

from ml_collections import ConfigDict

from configs import quickstart
from iha_jax.overrides import Override, grid, product, zipped

ARMS = ("mha", "windows", "iha")
WIDTHS = (32, 48, 64, 80)


def get_config(arm: str = "iha") -> ConfigDict:
    config = quickstart.get_config("iha" if arm == "iha" else "mha")
    if arm == "windows":
        config.model.layer_pattern = ("mha_local",) * 4 + ("mha",)
        config.model.window = 4
    config.optimizer.warmup_steps = 20
    config.training.eval_every = 100
    config.training.checkpoint_every = 500
    return config


def get_sweep() -> list[Override]:
    sizes = zipped(
        {
            "model.width": WIDTHS,
            "model.mlp_width": [4 * width for width in WIDTHS],
            "optimizer.learning_rate": (0.014, 0.0093, 0.007, 0.0056),
            "training.steps": (100, 220, 385, 590),
        }
    )
    return product(grid({"seed": range(3)}), sizes, grid({"arm": ARMS}))
