"""MHA and IHA of matched size on the Python standard library's sources, on a laptop's CPU.

    python -m iha_jax.compare --config=configs/quickstart.py --workdir=runs/quickstart

trains both arms with three seeds each and draws their loss curves. One arm alone:

    python train.py --config=configs/quickstart.py:mha --workdir=runs/mha

Both arms end below 3.2 bits per byte; times and losses seen are in docs/log.md.
"""

from ml_collections import ConfigDict

from configs import base

ARMS = ("mha", "iha")


def get_config(arm: str = "iha") -> ConfigDict:
    config = base.get_config()
    if arm == "iha":
        config.model.layer_pattern = ("iha_local",) * 4 + ("mha",)

    config.model.context_length = 128
    config.model.width = 64
    config.model.mlp_width = 256
    config.optimizer.learning_rate = 7e-3
    config.optimizer.warmup_steps = 30
    config.training.steps = 500
    config.training.log_every = 25
    config.training.eval_every = 50
    config.training.eval_rows = 128
    config.training.checkpoint_every = 250
    return config


def get_comparison() -> ConfigDict:
    comparison = ConfigDict()
    comparison.arms = ARMS
    comparison.seeds = 3
    comparison.learning_rates = ()  # several: each arm gets its own sweep, and the table shows "best of" too
    comparison.controls = ()  # "widened": MHA given the mixing cost as MLP; "longer": MHA trained for IHA's wall-clock
    return comparison
