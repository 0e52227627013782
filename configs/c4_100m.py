"""MHA and IHA of 109 M parameters on C4, 2.5 B tokens each: a comparison for one GPU or a v5e-8.

    python -m iha_jax.compare --config=configs/c4_100m.py --workdir=runs/c4_100m \
        --config.data.data_dir=/data/tfds --config.data.tokenizer=hf:/data/tokenizer.json

trains both arms with three seeds each; one arm alone:

    python train.py --config=configs/c4_100m.py:iha --workdir=runs/c4_100m_iha \
        --config.data.data_dir=/data/tfds --config.data.tokenizer=hf:/data/tokenizer.json

| arm | layers                                    | parameters  |
|-----|-------------------------------------------|-------------|
| mha | MHA everywhere                            | 109 428 480 |
| iha | four local IHA layers (P = 4, W = 64), then one global MHA, twice | 109 446 912 |

The tokenizer may have up to 50 304 tokens (GPT-2's padded). 20 tokens a parameter and more; the learning rate is tuned
for neither arm. Hardware: one H100 80 GB, or a v5e-8 (`v5e:2x4`), as it is. On a GPU
`--config.data.document_attention=False` lets MHA take cuDNN.

Not run yet. `python -m iha_jax.plan` says for IHA, at 60 % of peak in products: 0.7 h a run and, by the compiler,
5.2 of 15.75 GiB a chip on a v5e-8; 1.1 h and 21 GiB on one H100, by closed forms alone. Expect longer.
"""

from ml_collections import ConfigDict

from configs import base

ARMS = ("mha", "iha")


def get_config(arm: str = "iha") -> ConfigDict:
    config = base.get_config()

    model = config.model
    model.vocab_size = 50_304
    model.context_length = 2048
    model.width = 768
    model.num_layers = 10
    model.num_heads = 12
    model.mlp_width = 3072
    model.compute_dtype = "bfloat16"
    if arm == "iha":
        model.layer_pattern = ("iha_local",) * 4 + ("mha",)  # window max(1, 2048 // (2 * 4**2)) = 64 tokens

    config.data.sources = ("c4/en",)
    config.data.tokenizer = "hf:tokenizer.json"
    config.data.workers = 8

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 250

    training = config.training
    training.steps = 4800
    training.batch_size = 256  # 2^19 tokens a step
    training.accumulation = 16  # 16 rows at a time: one GPU, or 2 on each of 8 chips
    training.loss_chunk = 512
    training.eval_every = 400
    training.eval_rows = 512
    training.eval_batch_size = 16
    training.checkpoint_every = 400
    return config


def get_comparison() -> ConfigDict:
    comparison = ConfigDict()
    comparison.arms = ARMS
    comparison.seeds = 3
    comparison.learning_rates = ()
    comparison.controls = ("widened",)
    return comparison
