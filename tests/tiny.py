"""Tiny configs for tests: odd sizes that differ from one another, a few thousand parameters."""

from typing import Any

from configs import base
from iha_jax.config import Config, resolve

HYBRID = ("iha_local", "iha_local", "mha")


def tiny(**changes: Any) -> Config:
    """A small config; `tiny(model__qk_norm=True)` sets `config.model.qk_norm`."""
    config = base.get_config()
    config.model.update(
        vocab_size=257, context_length=23, width=24, num_layers=5, num_heads=6, head_width=4, mlp_width=29
    )
    config.model.layer_pattern = HYBRID  # one whole repetition and two layers left over
    config.model.window = 7
    config.model.iha.update(pseudo_heads=3, window=3)
    config.model.simplicial.update(window=5, second_window=3)
    config.data.tokenizer = "bytes"
    config.training.update(steps=6, batch_size=4, log_every=1, eval_every=3, eval_rows=6, eval_batch_size=4)
    config.training.checkpoint_every = 3
    config.optimizer.warmup_steps = 2
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = config
        for section in sections:
            place = place[section]
        with place.unlocked(), place.ignore_type():
            place[key] = value
    return resolve(config)
