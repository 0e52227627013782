"""What of IHA matters? One choice changed at a time, on the quickstart's model, three seeds each, on a laptop's CPU:

    python -m iha_jax.compare --config=configs/ablations_cpu.py --workdir=runs/ablations

compares every arm with the first, IHA as the quickstart trains it (P = 4, virtual causality and RoPE, global collapse,
copies of each head collapsed by their mean at the start), and draws the differences with their intervals. Four arms are
no IHA: MHA, MHA with IHA's windows and with wider ones, and heads mixed without interleaving. One arm alone:

    python train.py --config=configs/ablations_cpu.py:token_causality --workdir=runs/token_causality

The same of the relation-composition task: configs/relation_composition.py:ablations. Times and losses seen are in
docs/log.md.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import quickstart

WINDOW = 4  # tokens: 128 / (2 * 4^2), the quickstart's
# Of each arm the values that differ from IHA's in the quickstart.
CHANGES: dict[str, dict[str, Any]] = {
    "iha": {},
    "mha": {"model.layer_pattern": ("mha",)},
    "windows": {"model.layer_pattern": ("mha_local",) * 4 + ("mha",), "model.window": WINDOW},
    "wide_windows": {"model.layer_pattern": ("mha_local",) * 4 + ("mha",), "model.window": 4 * WINDOW},
    "fused_mixing": {"model.layer_pattern": ("fused_mixing",)},
    "start_noise": {"model.iha.init_noise": 0.1},
    "start_shifted": {"model.iha.mixing_init": "shifted"},
    "start_random": {"model.iha.mixing_init": "random", "model.iha.collapse_init": "random"},
    "token_causality": {"model.iha.causality": "token"},
    "token_rope": {"model.iha.rope_positions": "token"},
    "per_head_collapse": {"model.iha.collapse": "per_head"},
    "p1": {"model.iha.pseudo_heads": 1, "model.iha.window": WINDOW},
    "p2": {"model.iha.pseudo_heads": 2, "model.iha.window": WINDOW},
    "p2_matched": {"model.iha.pseudo_heads": 2},  # FLOP-matched: a window of 16
    "window_16": {"model.iha.window": 4 * WINDOW},
    "frozen_mixing": {"optimizer.mixing_multiplier": 0.0},
    "fast_mixing": {"optimizer.mixing_multiplier": 3.0},
}
ARMS = tuple(CHANGES)


def get_config(arm: str = "iha") -> ConfigDict:
    config = quickstart.get_config("iha")
    config.training.steps = 300
    config.training.eval_every = 100
    config.training.checkpoint_every = 300
    config.update_from_flattened_dict(CHANGES[arm])
    return config


def get_comparison() -> ConfigDict:
    comparison = quickstart.get_comparison()
    comparison.arms = ARMS
    return comparison
