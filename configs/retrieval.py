"""MHA, Global+Local and IHA on generated multi-key retrieval, on a laptop's CPU: accuracy against length.

    python -m iha_jax.compare --config=configs/retrieval.py --workdir=runs/retrieval

trains each arm with three seeds on texts of up to 256 tokens and asks for keys that were trained and keys that were not
at 64 to 1 024 tokens; `comparison.md` has the accuracies with their intervals, `comparison_lengths.png` the picture.
What a text looks like is in the docstring of iha_jax/data/retrieval.py. One arm alone:

    python train.py --config=configs/retrieval.py:iha --workdir=runs/retrieval_iha

Two layers: a first that can tell a value which key stands before it, and a global one that can look it up. The first is
global (`mha`), sees 16 tokens (`global_local`: 1/16 of the context, as the paper's 512 of 8 192), or is IHA with P = 2
and a window of 4 tokens, an eighth of what would match MHA's visible pairs (`iha`).
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
    model.num_heads = 2
    model.head_width = 32
    model.mlp_width = 128
    model.window = 16
    model.iha.pseudo_heads = 2
    model.iha.window = 4
    model.qk_norm = True

    config.data.sources = ("retrieval",)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50

    training = config.training
    training.steps = 800
    training.batch_size = 16
    training.log_every = 50
    training.eval_every = 400
    training.eval_rows = 64  # texts of each length and kind of keys, four answers each
    training.eval_batch_size = 16
    training.checkpoint_every = 400
    return config


def get_comparison() -> ConfigDict:
    comparison = ConfigDict()
    comparison.arms = ARMS
    comparison.seeds = 3
    comparison.learning_rates = ()
    comparison.controls = ()
    return comparison
