"""MHA and IHA of matched size on the Python standard library's sources, on a laptop's CPU.

    python -m iha_jax.compare --config=configs/quickstart.py --workdir=runs/quickstart

trains both arms with several seeds and draws their loss curves. One arm alone:

    python train.py --config=configs/quickstart.py:mha --workdir=runs/mha
"""

from ml_collections import ConfigDict

from configs import base

ARMS = ("mha", "iha")


def get_config(arm: str = "iha") -> ConfigDict:
    config = base.get_config()
    if arm == "iha":
        config.model.layer_pattern = ("iha_local",) * 4 + ("mha",)
    return config


def get_comparison() -> ConfigDict:
    comparison = ConfigDict()
    comparison.arms = ARMS
    comparison.seeds = 3
    comparison.learning_rates = ()
    comparison.controls = ()
    return comparison
