"""MHA and IHA of 366 M parameters on C4, 7.3 B tokens each: a comparison for one GPU or a v5e-8.

    python -m iha_jax.compare --config=configs/c4_350m.py --workdir=runs/c4_350m \
        --config.data.data_dir=/data/tfds --config.data.tokenizer=hf:/data/tokenizer.json

trains both arms with three seeds each; one arm alone:

    python train.py --config=configs/c4_350m.py:iha --workdir=runs/c4_350m_iha \
        --config.data.data_dir=/data/tfds --config.data.tokenizer=hf:/data/tokenizer.json

| arm | layers                                    | parameters  |
|-----|-------------------------------------------|-------------|
| mha | MHA everywhere                            | 366 136 320 |
| iha | four local IHA layers (P = 4, W = 64), then one global MHA, five times | 366 218 240 |

The tokenizer may have up to 50 304 tokens (GPT-2's padded). 20 tokens a parameter and more; the learning rate is tuned
for neither arm. Hardware: one H100 80 GB, or a v5e-8 (`v5e:2x4`), as it is. On a GPU
`--config.data.document_attention=False` lets MHA take cuDNN.

Not run yet. `python -m iha_jax.plan` says for IHA, at 60 % of peak in products: 6.4 h a run and, by the compiler,
12.3 of 15.75 GiB a chip on a v5e-8; 10.2 h and 33 GiB on one H100, by closed forms alone. Expect longer.
"""

from ml_collections import ConfigDict

from configs import c4_100m

ARMS = c4_100m.ARMS
get_comparison = c4_100m.get_comparison


def get_config(arm: str = "iha") -> ConfigDict:
    config = c4_100m.get_config(arm)

    model = config.model
    model.width = 1024
    model.num_layers = 25
    model.num_heads = 16
    model.mlp_width = 4096

    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 700

    training = config.training
    training.steps = 14_000
    training.accumulation = 32  # 8 rows at a time: one GPU, or 1 on each of 8 chips
    training.eval_every = 1000
    training.eval_batch_size = 8
    training.checkpoint_every = 1000
    return config
