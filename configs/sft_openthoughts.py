"""The paper's supervised fine-tuning: a trained 2.4 B model on OpenThoughts, 8 B tokens.

    python train.py --config=configs/sft_openthoughts.py:iha --workdir=gs://bucket/runs/iha_sft \
        --config.training.init_from=gs://bucket/runs/iha --config.data.sources=chat:openthoughts.jsonl \
        --config.data.tokenizer=hf:/path/to/llama3/tokenizer.json

Arms and sizes are those of configs/paper_2p4b.py; `init_from` is a run of the same arm (its parameters alone). The data
are one JSONL file in the layout of OpenThoughts, as `datasets.load_dataset(...).to_json("openthoughts.jsonl")` writes
it; about 5 % of its lines are the validation split. The loss is that of the assistant's turns. Conversations longer
than the context are truncated, and the first lines of the run say how many. The paper states data set and tokens and
nothing else: context, learning rate, batch and schedule are ours. A release of fewer tokens is seen several times.

Hardware: as configs/paper_2p4b.py. It has not been run at full size.
"""

from ml_collections import ConfigDict

from configs import paper_2p4b

ARMS = paper_2p4b.ARMS


def get_config(arm: str = "iha") -> ConfigDict:
    config = paper_2p4b.get_config(arm)
    config.model.iha.window = 10  # as trained, whatever context is set
    config.data.sources = ("chat:openthoughts.jsonl",)

    config.optimizer.learning_rate = 8e-5  # a tenth of pretraining's
    config.optimizer.warmup_steps = 200

    training = config.training
    training.init_from = "runs/iha_2p4b"  # set, so that forgetting it is refused instead of training from nothing
    training.steps = 7630  # 8.0 B tokens
    training.eval_every = 500
    return config
