"""The paper's synthetic experiment (appendix D): relation composition, labelled by one layer of each mechanism.

    python -m iha_jax.relation_composition --config=configs/relation_composition.py --workdir=runs/relations

is all of it, two and three hops, eight arms at two learning rates, five seeds each: for a GPU. On a laptop's CPU:

    python -m iha_jax.relation_composition --config=configs/relation_composition.py:reduced --workdir=runs/relations

After the colon stands an experiment (binary, ternary, reduced, ablations; several with commas). The same command goes
on where it stopped. `--config.experiment.seeds=10` changes an experiment, `--config.model.width=64` the model of all.

From the paper: task, sizes, densities, numbers of examples, one layer, 8 heads, P = 8, learning rates, patience. Its
parameter counts, as quoted by others, fit width 128, MLP 512, learned positions and the biases of
iha_jax/model/labeller.py. Ours: the optimizer (AdamW, constant rate after warm-up, clipping), the batch, the pre-norm
order, validation loss as what patience watches, at most 100 epochs, and how head mixing starts. Ternary: 206 849
parameters for MHA, 208 513 for IHA with P = 8, 239 873 for 2-simplicial attention.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base

PROGRAM = "iha_jax.relation_composition"  # what trains it, train.py too
MECHANISMS = ("mha", "iha", "iha_p2", "iha_p4", "simplicial", "talking_heads", "differential", "fused_mixing")
PSEUDO_HEADS = {"iha": 8, "iha_p2": 2, "iha_p4": 4}
# What differs from iha_p4. Without a causal mask and RoPE, causality and positions of pseudo-tokens have no part in it.
COPIES = {"model.iha.mixing_init": "identity", "model.iha.collapse_init": "mean"}
ABLATIONS: dict[str, dict[str, Any]] = {
    "start_copies": COPIES,
    "start_noise": {**COPIES, "model.iha.init_noise": 0.1},
    "start_shifted": {**COPIES, "model.iha.mixing_init": "shifted"},
    "per_head_collapse": {"model.iha.collapse": "per_head"},
    "window_9": {"model.layer_pattern": ("iha_local",), "model.iha.window": 9},
    "frozen_mixing": {"optimizer.mixing_multiplier": 0.0},
    "fast_mixing": {"optimizer.mixing_multiplier": 3.0},
}
ARMS = (*MECHANISMS, *ABLATIONS)
SIZES = {"binary": (6, 10), "ternary": (5, 8), "reduced": (4, 5), "ablations": (4, 5)}
EXPERIMENTS = tuple(SIZES)
DEFAULT_EXPERIMENTS = ("binary", "ternary")  # what runs when none is named


def get_config(arm: str = "iha") -> ConfigDict:
    config = base.get_config()
    interleaved = arm in PSEUDO_HEADS or arm in ABLATIONS
    config.model.layer_pattern = ("iha",) if interleaved else (arm,)
    config.model.vocab_size = 2
    config.model.context_length = 100  # places; set to those of the experiment
    config.model.width = 128
    config.model.num_layers = 1
    config.model.num_heads = 8
    config.model.mlp_width = 512
    config.model.causal = False
    config.model.positions = "none"  # learned ones instead
    config.model.iha.pseudo_heads = PSEUDO_HEADS.get(arm, 4 if arm in ABLATIONS else 8)
    # Without a causal mask and RoPE, pseudo-heads that start as copies would stay copies for ever.
    config.model.iha.mixing_init = "random"
    config.model.iha.collapse_init = "random"

    config.optimizer.final_fraction = 1.0  # constant after warm-up: how long a run is, early stopping decides
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.01
    config.optimizer.beta2 = 0.999
    config.training.batch_size = 160  # equally many of each size
    config.update_from_flattened_dict(ABLATIONS.get(arm, {}))
    return config


def get_experiment(name: str) -> ConfigDict:
    experiment = ConfigDict()
    experiment.hops = 3 if name == "ternary" else 2
    experiment.smallest_size, experiment.largest_size = SIZES[name]
    experiment.density = 0.264 if name == "ternary" else 0.325  # share of ones in a relation
    experiment.train_examples = 40_000
    experiment.validation_examples = 5_000
    experiment.test_examples = 5_000
    experiment.data_seed = 0  # all runs of an experiment see the same examples
    experiment.arms = MECHANISMS
    experiment.learning_rates = (1e-3, 1e-4)
    experiment.seeds = 5  # initial weights and order of examples; trained side by side
    experiment.epochs = 100  # at most
    experiment.patience = 10  # epochs without a lower validation loss, then a seed stops
    if name == "reduced":
        experiment.train_examples, experiment.validation_examples, experiment.test_examples = 8_000, 1_000, 1_000
        experiment.arms = ("mha", "iha_p2", "iha_p4", "simplicial")
        experiment.learning_rates = (1e-3,)
        experiment.seeds = 3
        experiment.epochs = 20
    if name == "ablations":  # too short for the best to reach 100 %, so that differences show
        experiment.train_examples, experiment.validation_examples, experiment.test_examples = 4_000, 1_000, 1_000
        experiment.arms = ("iha_p4", "mha", "fused_mixing", "iha_p2", *ABLATIONS)
        experiment.learning_rates = (1e-3,)
        experiment.seeds = 3
        experiment.epochs = 12
    return experiment
