"""MHA, Global+Local and IHA on generated multi-key retrieval, on a laptop's CPU: accuracy against length.

python -m iha_jax.compare --config=configs/retrieval.py --workdir=runs/retrieval
"""

from ml_collections import ConfigDict

from configs import base

ARMS = ("mha", "global_local", "iha")
PATTERNS = {"mha": ("mha",), "global_local": ("mha_local", "mha"), "iha": ("iha_local", "mha")}


def get_config(arm: str = "iha") -> ConfigDict:
    config = base.get_config()
    model = config.model
    model.layer_pattern = PATTERNS[arm]
    model.context_length = 256
    model.width = 64
    model.num_layers = 2
    model.mlp_width = 256
    model.window = 16

    config.data.sources = ("retrieval",)
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.01
    config.training.steps = 2000
    config.training.batch_size = 16
    config.training.log_every = 50
    config.training.eval_every = 500
    config.training.eval_rows = 32
    config.training.checkpoint_every = 1000
    return config


def get_comparison() -> ConfigDict:
    comparison = ConfigDict()
    comparison.arms = ARMS
    comparison.seeds = 3
    comparison.learning_rates = ()
    comparison.controls = ()
    return comparison
