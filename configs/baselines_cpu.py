"""Seven attention mechanisms on the Python standard library's sources, on a laptop's CPU.

    python -m iha_jax.compare --config=configs/baselines_cpu.py --workdir=runs/baselines_cpu

trains each arm with two seeds and compares all to the first, global MHA. One arm alone:

    python train.py --config=configs/baselines_cpu.py:differential --workdir=runs/differential

The size of configs/quickstart.py. Windows keep the paper's proportions: 1/16 of the context for sliding-window MHA (512
of 8192 there), `N / (2 P^2)` for IHA. The simplicial arm has one such layer in five, 3 % more parameters than the
others. Times and losses seen are in docs/log.md.
"""

from ml_collections import ConfigDict

from configs import base

ARMS = ("global", "global_local", "iha", "talking_heads", "differential", "simplicial", "fused_mixing")
PATTERNS = {
    "global_local": ("mha_local",) * 4 + ("mha",),
    "iha": ("iha_local",) * 4 + ("mha",),
    "simplicial": ("mha",) * 4 + ("simplicial_local",),
    "talking_heads": ("talking_heads",),
    "differential": ("differential",),
    "fused_mixing": ("fused_mixing",),
}


def get_config(arm: str = "iha") -> ConfigDict:
    config = base.get_config()
    model = config.model
    model.layer_pattern = PATTERNS.get(arm, ("mha",))
    model.context_length = 128
    model.width = 64
    model.mlp_width = 256
    model.window = 8
    model.simplicial.window, model.simplicial.second_window = 64, 16

    config.optimizer.learning_rate = 7e-3
    config.optimizer.warmup_steps = 30
    config.training.steps = 700
    config.training.log_every = 25
    config.training.eval_every = 100
    config.training.eval_rows = 128
    config.training.checkpoint_every = 350
    return config


def get_comparison() -> ConfigDict:
    comparison = ConfigDict()
    comparison.arms = ARMS
    comparison.seeds = 2
    comparison.learning_rates = ()
    comparison.controls = ()
    return comparison
