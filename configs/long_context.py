"""The long-context recipe on a laptop's CPU: a quickstart model goes on at four times its context.

    python train.py --config=configs/quickstart.py:iha --workdir=runs/iha
    python train.py --config=configs/long_context.py:iha --workdir=runs/iha_512

Arms: `mha`; `iha`, with the window of 4 tokens that a context of 128 gave; `iha_rederived`, with the 16 that 512 gives,
so that a local layer sees as many pairs as causal MHA again. All start from the parameters of `runs/<arm>` (for
`iha_rederived`: `runs/iha`), with RoPE's theta four times what it was. configs/paper_2p4b_64k.py is the same at size.
"""

from ml_collections import ConfigDict

from configs import quickstart

ARMS = (*quickstart.ARMS, "iha_rederived")


def get_config(arm: str = "iha") -> ConfigDict:
    pretrained = arm.removesuffix("_rederived")
    config = quickstart.get_config(pretrained)
    config.model.context_length = 512
    config.model.iha.window = 0 if arm == "iha_rederived" else 4  # 0: derived from the context above
    config.model.rope_theta = 40_000.0

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 10

    training = config.training
    training.init_from = f"runs/{pretrained}"
    training.steps = 100
    training.batch_size = 2
    training.eval_every = 25
    training.eval_rows = 32
    return config
