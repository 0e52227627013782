"""Every field of a config once, with its default: a small byte-level model for one CPU.

Other files start from this one and change a handful of lines. Run it as it is:

    python train.py --config=configs/base.py --workdir=runs/base

Types, valid values and the rules between them are checked by `iha_jax/config.py` before anything is compiled.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # initial weights and data order

    config.model = model = ConfigDict()
    model.vocab_size = 257  # at least the tokenizer's; bytes have 256 and one document separator
    model.context_length = 256  # N, tokens a row
    model.width = 128  # D
    model.num_layers = 5
    model.num_heads = 4  # H
    model.num_kv_heads = 0  # K, dividing H; 0: as many as num_heads
    model.head_width = 0  # d; 0: width // num_heads
    model.mlp_width = 512
    model.mlp = "gelu"  # gelu | swiglu
    model.tie_embeddings = True  # output projection = embedding table
    model.qk_norm = False  # RMSNorm on queries and keys, before head mixing and RoPE
    model.norm_epsilon = 1e-6
    model.causal = True  # False: every token sees both sides, for sequence labelling; no language-model training
    model.positions = "rope"  # rope | none; simplicial layers never rotate
    model.rope_theta = 10_000.0
    # mha | mha_local | iha | iha_local | talking_heads | differential | simplicial | simplicial_local | fused_mixing
    model.layer_pattern = ("mha",)  # repeated to num_layers, a remainder is allowed
    model.window = 64  # tokens, mha_local only; the query's own included
    # Of dot-product attention (mha, mha_local, differential, fused_mixing); talking heads and simplicial layers have
    # their one block-wise form, unless this is "reference".
    model.implementation = "auto"  # auto | reference | blockwise | cudnn (GPU) | splash (TPU)
    model.compute_dtype = "float32"  # float32 | bfloat16; parameters, softmax, norms and loss stay float32
    model.remat = "none"  # none | full | dots (all but products with weights): what the backward pass recomputes
    model.scan_layers = True  # False: a Python loop over layers, slower to compile, easier to debug

    model.iha = iha = ConfigDict()
    iha.pseudo_heads = 4  # P
    iha.window = 0  # tokens, iha_local only; 0: max(1, N // (2 P^2)), which matches global MHA's visible pairs
    iha.collapse = "global"  # global: R is [H, H, P] | per_head: [H, P]
    iha.causality = "virtual"  # virtual: causal on the N*P sequence | token: all P of a visible token
    iha.rope_positions = "virtual"  # virtual: n*P + p | token: n | none
    iha.mixing_init = "identity"  # identity | shifted | first | random (table in iha_jax/model/init.py)
    iha.collapse_init = "mean"  # mean | last | first | random
    iha.init_noise = 0.0  # standard deviation of noise added to the three alphas
    iha.implementation = "auto"  # auto | reference | streaming | fused (TPU, GPU)

    model.simplicial = simplicial = ConfigDict()
    simplicial.window = 64  # tokens, simplicial_local only; the query's own included
    simplicial.second_window = 16  # the same for the second key of each pair

    config.data = data = ConfigDict()
    # stdlib | a prepared TFDS directory | a TFDS name such as c4/en | chat:FILE.jsonl or chat:FOLDER: conversations, of
    # which the assistant's turns count in the loss, in rows of whole ones
    data.sources = ("stdlib",)
    data.weights = (1.0,)  # one a source; validation uses the first source
    data.train_split = "train"
    data.validation_split = "validation"
    data.text_feature = "text"
    data.data_dir = ""  # where TFDS finds named data sets; empty: its default
    data.cache_dir = ""  # where packed rows are kept; empty: ~/.cache/iha_jax
    data.tokenizer = "bytes"  # bytes | hf:/path/tokenizer.json | sp:/path/x.model
    data.document_attention = True  # tokens see only their own document
    data.workers = 0  # data loader processes; the order of examples does not depend on it

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 3e-3  # peak
    optimizer.final_fraction = 0.1  # floor of the cosine, as a fraction of the peak
    optimizer.warmup_steps = 50
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.95
    optimizer.epsilon = 1e-8
    optimizer.weight_decay = 0.1  # not on norms, biases and head-mixing weights
    optimizer.clip_norm = 1.0
    optimizer.mixing_multiplier = 1.0  # learning rate of head-mixing weights, relative to the rest; 0: they stay

    config.training = training = ConfigDict()
    training.steps = 500
    training.batch_size = 8  # rows a step, over all devices
    training.accumulation = 1  # micro-batches a step
    training.z_loss = 0.0  # weight of logsumexp(logits)^2
    training.loss_chunk = 0  # tokens of a row whose logits are held at once; 0: all
    training.log_every = 10
    training.eval_every = 100
    training.eval_rows = 64  # fixed rows of the validation split; 0: all
    training.eval_batch_size = 8
    training.checkpoint_every = 100
    training.keep_checkpoints = 2  # newest ones; the last that was read back and found right stays beside them
    training.max_skipped_steps = 10  # steps in a row with a loss or gradient that is not finite, before the run ends
    training.spike_threshold = 0.0  # nats above the recent median loss: go back, leave data out; 0: never
    training.max_rollbacks = 3
    training.watchdog_seconds = 1800.0  # a step that takes longer ends the process, stacks printed; 0: never
    training.init_from = ""  # run directory whose parameters to start from (for IHA: a trained MHA)
    training.init_from_step = 0  # 0: its last
    training.init_from_state = False  # True: its optimizer state and step too; it goes on to training.steps
    training.tensorboard = False
    training.wandb_project = ""

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # batch split, weights copied; -1: all devices that the other axes leave
    mesh.fsdp = 1  # batch and weights split
    mesh.context = 1  # tokens of a row split: long contexts
    mesh.tensor = 1  # heads, feed-forward width and vocabulary split
    return config
