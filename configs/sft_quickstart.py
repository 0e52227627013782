"""Fine-tuning on a laptop's CPU: a quickstart model learns to answer small sums. From nothing to Maj@16:

    python train.py --config=configs/quickstart.py:iha --workdir=runs/iha
    python -m iha_jax.data.arithmetic --output=data/arithmetic
    python train.py --config=configs/sft_quickstart.py:iha --workdir=runs/iha_sft
    python eval.py --workdir=runs/iha_sft --tasks=gsm8k --data=gsm8k=data/arithmetic/test.jsonl --chat \
        --samples=16 --shots=0 --temperature=0.6 --max_tokens=32

The first command makes the run that `training.init_from` names. Times and accuracies seen are in docs/log.md.
"""

from ml_collections import ConfigDict

from configs import quickstart

ARMS = quickstart.ARMS


def get_config(arm: str = "iha") -> ConfigDict:
    config = quickstart.get_config(arm)
    config.model.iha.window = 4  # as pretrained: 128 // (2 * 4**2)
    config.model.context_length = 256  # two to three conversations a row

    config.data.sources = ("chat:data/arithmetic",)
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 20

    training = config.training
    training.init_from = f"runs/{arm}"
    training.steps = 800
    training.eval_every = 100
    training.checkpoint_every = 200
    return config
