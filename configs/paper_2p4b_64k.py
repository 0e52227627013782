"""The paper's long-context fine-tune: a trained 2.4 B model goes on at a context of 65 536.

    python train.py --config=configs/paper_2p4b_64k.py:iha --workdir=gs://bucket/runs/iha_64k \
        --config.training.init_from=gs://bucket/runs/iha \
        --config.data.data_dir=gs://bucket/tfds --config.data.tokenizer=hf:/path/to/llama3/tokenizer.json

Arms and sizes are those of configs/paper_2p4b.py; `init_from` is a run of the same arm (`iha_rederived`: of `iha`). No
weight depends on the context. What does is chosen here, by name:

| choice     | kept: `iha`                      | the other                                                          |
|------------|----------------------------------|--------------------------------------------------------------------|
| IHA window | 10 tokens, which 8 192 gave      | `iha_rederived`: 65 536 // (2 * 20**2) = 81, MHA's visible pairs    |
| RoPE theta | 500 000                          | `--config.model.rope_theta=4e6`: 8 times, as the context           |

The paper states the length and nothing else: steps, learning rate and batch are ours, and so is keeping both. With
`--config.training.init_from_state=True` optimizer state and step go on too, and `training.steps` must count them.

Hardware: 128 v5p chips (`v5p:4x4x8`) as it is: 32 rows, each over 4 chips by tokens. It has not been run; what
`python -m iha_jax.plan` says of it is in docs/plans/README.md.
"""

from ml_collections import ConfigDict

from configs import paper_2p4b

ARMS = (*paper_2p4b.ARMS, "iha_rederived")


def get_config(arm: str = "iha") -> ConfigDict:
    config = paper_2p4b.get_config(arm.removesuffix("_rederived"))
    config.model.context_length = 65_536
    config.model.iha.window = 0 if arm == "iha_rederived" else 10  # 0: derived from the context above

    config.optimizer.learning_rate = 8e-5
    config.optimizer.warmup_steps = 100

    training = config.training
    training.init_from = "runs/iha_2p4b"  # set, so that forgetting it is refused instead of training from nothing
    training.steps = 1000  # 2.1 B tokens
    training.batch_size = 32
    training.eval_every = 250
    training.eval_rows = 64
    training.eval_batch_size = 32
    training.checkpoint_every = 250

    config.mesh.data, config.mesh.fsdp, config.mesh.context = 1, -1, 4
    return config
