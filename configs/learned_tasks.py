"""The theorems' tasks, learned: accuracy against the number of heads, for MHA and IHA.

    python -m iha_jax.learned_tasks --config=configs/learned_tasks.py --workdir=runs/learned

Two experiments, polynomial_filters and cpm3 (after a colon, one of them), on a laptop's CPU. The same command goes on
where it stopped. `--config.experiment.seeds=5` changes an experiment.

Layers are the theorems': one of attention on [X, I], widths of queries, keys and values those of the constructions,
which are settings of the parameters (a test sets them); the number of heads varies. IHA has P = H. `mha_matched` is MHA
of H heads with values so wide that its attention has the parameters of IHA with H heads.
"""

from ml_collections import ConfigDict

from configs import base

PROGRAM = "iha_jax.learned_tasks"  # what trains it, train.py too
EXPERIMENTS = ("polynomial_filters", "cpm3")


def get_experiment(name: str) -> ConfigDict:
    experiment = ConfigDict()
    experiment.task = name
    experiment.data_seed = 0  # all points of an experiment see the same examples
    experiment.optimizer = base.get_config().optimizer
    experiment.optimizer.final_fraction = 0.01  # a cosine over all epochs
    experiment.optimizer.warmup_steps = 100
    experiment.optimizer.weight_decay = 0.0
    experiment.optimizer.beta2 = 0.999
    if name == "polynomial_filters":
        experiment.tokens = 8  # N
        experiment.filters = 4  # k; the theorem: k heads of MHA, ceil(sqrt(k)) of IHA
        experiment.signals = 1  # r, numbers of a token
        experiment.matrix = "orthogonal"  # A: orthogonal | symmetric | not normal | cyclic shift
        experiment.mha_heads = (1, 2, 3, 4, 5)
        experiment.iha_heads = (1, 2, 3)
        experiment.matched_heads = (1, 2, 3)
        experiment.learning_rates = (1e-2, 2e-2)  # of several, the one with the lowest validation loss is reported
        experiment.train_examples, experiment.validation_examples, experiment.test_examples = 4096, 512, 1024
        experiment.batch_size = 32
        experiment.seeds = 5  # initial weights and order of examples; trained side by side
        experiment.epochs = 100  # at most
        experiment.patience = 100  # epochs without a lower validation loss, then a seed stops
    else:
        experiment.tokens = 6  # N = N_max; the theorem: N heads of MHA, ceil(sqrt(N)) of IHA
        experiment.modulus, experiment.factor = 3, 8  # M and G, sensitive to order
        experiment.mlp_width = 324  # units of the construction's MLP: 3 N^2 (T + 1)
        experiment.mha_heads = (1, 2, 3, 6)
        experiment.iha_heads = (1, 2, 3)
        experiment.matched_heads = (1, 2, 3)
        experiment.learning_rates = (1e-2,)
        experiment.train_examples, experiment.validation_examples, experiment.test_examples = 512, 64, 128
        experiment.batch_size = 64
        experiment.seeds = 3
        experiment.epochs = 400
        experiment.patience = 400
    return experiment
