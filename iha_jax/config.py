"""The resolved configuration of a run: frozen dataclasses, and every check on them.

`configs/base.py` holds the default of every field with a comment on each; this file holds their types, their valid
values and the rules between them. `resolve` turns a (nested) mapping into a `Config` or raises one `ConfigError`
that lists all problems. Derived values (head width, key/value heads, IHA's window) are frozen here, so that a run
directory's `config.json` holds what was really used.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

LAYER_KINDS = (
    "mha",
    "mha_local",
    "iha",
    "iha_local",
    "talking_heads",
    "differential",
    "simplicial",
    "simplicial_local",
    "fused_mixing",
)
IHA_KINDS = ("iha", "iha_local")
SIMPLICIAL_KINDS = ("simplicial", "simplicial_local")
REMAT_POLICIES = ("none", "full", "dots")


class ConfigError(ValueError):
    """One or more configuration values cannot be used. The message lists every problem, one a line."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"the config has {count}:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


def _number(low: float = -math.inf, high: float = math.inf, *, low_open: bool = False, valid: str = "") -> Any:
    return dataclasses.field(metadata={"low": low, "high": high, "low_open": low_open, "valid": valid})


def _positive() -> Any:
    return _number(low=0, low_open=True, valid="a number above 0")


def _not_negative(meaning_of_zero: str = "") -> Any:
    return _number(low=0, valid="0 or more" + (f" (0: {meaning_of_zero})" if meaning_of_zero else ""))


def _fraction() -> Any:
    return _number(low=0, high=1, valid="a number from 0 to 1")


def _choice(*choices: str) -> Any:
    return dataclasses.field(metadata={"choices": choices})


@dataclass(frozen=True, kw_only=True)
class IhaConfig:
    """Interleaved Head Attention: the switches of the paper and of what it leaves open."""

    pseudo_heads: int = _positive()
    window: int = _not_negative("max(1, context_length // (2 * pseudo_heads**2))")
    collapse: str = _choice("global", "per_head")
    causality: str = _choice("virtual", "token")
    rope_positions: str = _choice("virtual", "token", "none")
    mixing_init: str = _choice("identity", "shifted", "first", "random")
    collapse_init: str = _choice("mean", "last", "first", "random")
    init_noise: float = _not_negative()
    implementation: str = _choice("auto", "reference", "streaming", "fused")


@dataclass(frozen=True, kw_only=True)
class SimplicialConfig:
    """2-simplicial attention: the windows of its two key sets, for layers of kind `simplicial_local`."""

    window: int = _positive()
    second_window: int = _positive()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer. Letters as in the paper: D width, H heads, K key/value heads, d head width."""

    vocab_size: int = _positive()
    context_length: int = _positive()
    width: int = _positive()
    num_layers: int = _positive()
    num_heads: int = _positive()
    num_kv_heads: int = _not_negative("as many as num_heads")
    head_width: int = _not_negative("width // num_heads")
    mlp_width: int = _positive()
    mlp: str = _choice("gelu", "swiglu")
    tie_embeddings: bool
    qk_norm: bool
    norm_epsilon: float = _positive()
    causal: bool
    positions: str = _choice("rope", "none")
    rope_theta: float = _positive()
    layer_pattern: tuple[str, ...] = _choice(*LAYER_KINDS)
    window: int = _positive()
    implementation: str = _choice("auto", "reference", "blockwise", "cudnn", "splash")
    compute_dtype: str = _choice("float32", "bfloat16")
    remat: str = _choice(*REMAT_POLICIES)
    scan_layers: bool
    iha: IhaConfig
    simplicial: SimplicialConfig

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer: the pattern repeated, the last repetition cut off at `num_layers`."""
        return tuple(self.layer_pattern[i % len(self.layer_pattern)] for i in range(self.num_layers))

    @property
    def num_groups(self) -> int:
        """Whole repetitions of the layer pattern; their layers are stacked and scanned."""
        return self.num_layers // len(self.layer_pattern)

    @property
    def uses_iha(self) -> bool:
        return any(kind in IHA_KINDS for kind in self.layer_kinds)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes (`iha_jax/parallel/mesh.py`); -1 for one of them: inferred from the device count."""

    data: int = _number(low=-1, valid="a positive size, or -1 to infer it")
    fsdp: int = _number(low=-1, valid="a positive size, or -1 to infer it")
    context: int = _number(low=-1, valid="a positive size, or -1 to infer it")
    tensor: int = _number(low=-1, valid="a positive size, or -1 to infer it")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, how it is cut into tokens, and where prepared data lives."""

    sources: tuple[str, ...]
    weights: tuple[float, ...] = _positive()
    train_split: str
    validation_split: str
    text_feature: str
    data_dir: str
    cache_dir: str
    tokenizer: str
    document_attention: bool
    workers: int = _not_negative()


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a cosine to a floor."""

    learning_rate: float = _positive()
    final_fraction: float = _fraction()
    warmup_steps: int = _not_negative()
    beta1: float = _number(0, 1, valid="a number from 0 to 1")
    beta2: float = _number(0, 1, valid="a number from 0 to 1")
    epsilon: float = _positive()
    weight_decay: float = _not_negative()
    clip_norm: float = _positive()
    mixing_multiplier: float = _not_negative("head mixing stays as it starts")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, in what batches, and what is done on the way."""

    steps: int = _positive()
    batch_size: int = _positive()
    accumulation: int = _positive()
    z_loss: float = _not_negative()
    loss_chunk: int = _not_negative("the whole row at once")
    log_every: int = _positive()
    eval_every: int = _positive()
    eval_rows: int = _not_negative("the whole validation split")
    eval_batch_size: int = _positive()
    checkpoint_every: int = _positive()
    keep_checkpoints: int = _positive()
    max_skipped_steps: int = _positive()
    spike_threshold: float = _not_negative("no rollbacks")
    max_rollbacks: int = _not_negative("the first spike ends the run")
    watchdog_seconds: float = _not_negative("no watchdog")
    init_from: str
    init_from_step: int = _not_negative("the last one")
    init_from_state: bool
    tensorboard: bool
    wandb_project: str


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run depends on."""

    seed: int = _not_negative()
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    mesh: MeshConfig


def resolve(values: Any) -> Config:
    """Checks a `ConfigDict`, or a nested mapping such as a parsed `config.json`, and freezes it into a `Config`.

    Raises:
      ConfigError: listing every unknown or missing key, wrong type, value out of range, and broken rule between values.
    """
    if hasattr(values, "to_dict"):  # an ml_collections.ConfigDict, which this module need not import
        values = values.to_dict()
    problems: list[str] = []
    config = build(Config, values, "config", problems)
    if config is not None and not problems:
        config = _derive(config)
        problems += _check_rules(config)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def resolve_model(values: Any) -> ModelConfig:
    """The `model` section of a resolved config, as `as_dict` writes it, checked. Raises ConfigError as `resolve`."""
    problems: list[str] = []
    model = build(ModelConfig, values, "config.model", problems)
    if model is not None and not problems:
        problems += _check_model(model)
    if problems or model is None:
        raise ConfigError(problems)
    return model


def as_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested dictionaries, the way `config.json` holds it (tuples become lists)."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def default_iha_window(context_length: int, pseudo_heads: int) -> int:
    """`max(1, N // (2 P^2))` tokens: with it an IHA layer sees as many pairs as causal MHA (§4.1)."""
    return max(1, context_length // (2 * pseudo_heads**2))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def build(cls: type, values: Any, path: str, problems: list[str]) -> Any:
    """The frozen dataclass `cls` from a mapping, its fields checked by themselves; what is wrong with any of them is
    added to `problems`. None when fields are missing."""
    if not isinstance(values, Mapping):
        problems.append(f"{path} = {values!r}: expected a section with keys {', '.join(get_type_hints(cls))}")
        return None
    types, found = get_type_hints(cls), {}
    for key in values:
        if key not in types:
            close = difflib.get_close_matches(str(key), types, n=1)
            hint = f"did you mean {path}.{close[0]}?" if close else f"valid keys: {', '.join(types)}"
            problems.append(f"{path}.{key} = {values[key]!r}: no such key; {hint}")
    for field in dataclasses.fields(cls):
        name, kind = f"{path}.{field.name}", types[field.name]
        if field.name not in values:
            problems.append(f"{name} is missing")
        elif dataclasses.is_dataclass(kind):
            found[field.name] = build(kind, values[field.name], name, problems)  # type: ignore[arg-type]
        else:
            found[field.name] = _check_value(name, values[field.name], kind, field.metadata, problems)
    return cls(**found) if len(found) == len(types) else None


def _check_value(name: str, value: Any, kind: Any, rules: Mapping[str, Any], problems: list[str]) -> Any:
    if get_origin(kind) is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            problems.append(f"{name} = {value!r}: expected a tuple with at least one item")
            return ()
        item_kind = get_args(kind)[0]
        return tuple(_check_value(f"{name}[{i}]", v, item_kind, rules, problems) for i, v in enumerate(value))
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        expected = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}[kind]
        problems.append(f"{name} = {value!r}: expected {rules.get('valid') or expected}, got {type(value).__name__}")
        return value
    if "choices" in rules and value not in rules["choices"]:
        close = difflib.get_close_matches(str(value), rules["choices"], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        problems.append(f"{name} = {value!r}: expected one of {', '.join(map(repr, rules['choices']))}{hint}")
    if kind in (int, float) and not _in_range(value, rules):
        problems.append(f"{name} = {value!r}: expected {rules.get('valid') or 'a finite number'}")
    return float(value) if kind is float else value


def _in_range(value: float, rules: Mapping[str, Any]) -> bool:
    low, high = rules.get("low", -math.inf), rules.get("high", math.inf)
    above = value > low if rules.get("low_open") else value >= low
    return math.isfinite(value) and above and value <= high


def _derive(config: Config) -> Config:
    model, iha = config.model, config.model.iha
    window = iha.window or default_iha_window(model.context_length, iha.pseudo_heads)
    model = dataclasses.replace(
        model,
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_width=model.head_width or model.width // model.num_heads,
        iha=dataclasses.replace(iha, window=window),
    )
    return dataclasses.replace(config, model=model)


def _check_rules(config: Config) -> list[str]:
    return _check_model(config.model) + _check_training(config)


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)


def _check_model(model: ModelConfig) -> list[str]:
    problems = []
    derived_width = model.head_width * model.num_heads == model.width
    if model.width % model.num_heads and not derived_width and model.head_width == model.width // model.num_heads:
        problems.append(
            f"config.model.num_heads = {model.num_heads}: does not divide config.model.width = {model.width}; "
            f"choose one of {_divisors(model.width)}, or set config.model.head_width"
        )
    if model.num_heads % model.num_kv_heads:
        problems.append(
            f"config.model.num_kv_heads = {model.num_kv_heads}: does not divide config.model.num_heads = "
            f"{model.num_heads}; choose one of {_divisors(model.num_heads)}"
        )
    if "differential" in model.layer_kinds and (model.num_heads % 2 or model.num_kv_heads % 2):
        problems.append(
            f"config.model.num_heads = {model.num_heads} with num_kv_heads = {model.num_kv_heads}: layers of kind "
            f"'differential' halve both, so they must be even"
        )
    if model.head_width % 2 and model.positions == "rope":
        problems.append(f"config.model.head_width = {model.head_width}: RoPE rotates pairs, so it must be even")
    for kind, key, window in (
        ("mha_local", "window", model.window),
        ("iha_local", "iha.window", model.iha.window),
        ("simplicial_local", "simplicial.window", model.simplicial.window),
        ("simplicial_local", "simplicial.second_window", model.simplicial.second_window),
    ):
        if kind in model.layer_kinds and window > model.context_length:
            problems.append(
                f"config.model.{key} = {window}: larger than config.model.context_length = {model.context_length}; "
                f"choose at most {model.context_length}, or layers of kind {kind.removesuffix('_local')!r}"
            )
    if len(model.layer_pattern) > model.num_layers:
        problems.append(
            f"config.model.layer_pattern has {len(model.layer_pattern)} layers, more than config.model.num_layers = "
            f"{model.num_layers}; shorten the pattern or add layers"
        )
    return problems


def _check_training(config: Config) -> list[str]:
    problems, training, data = [], config.training, config.data
    for axis, size in dataclasses.asdict(config.mesh).items():
        if size == 0:
            problems.append(f"config.mesh.{axis} = 0: expected a positive size, or -1 to infer it")
    if training.batch_size % training.accumulation:
        problems.append(
            f"config.training.accumulation = {training.accumulation}: does not divide config.training.batch_size = "
            f"{training.batch_size}; choose one of {_divisors(training.batch_size)}"
        )
    if config.optimizer.warmup_steps >= max(1, training.steps - 1):
        problems.append(
            f"config.optimizer.warmup_steps = {config.optimizer.warmup_steps}: must be below "
            f"config.training.steps - 1 = {training.steps - 1}"
        )
    if training.loss_chunk and config.model.context_length % training.loss_chunk:
        problems.append(
            f"config.training.loss_chunk = {training.loss_chunk}: does not divide config.model.context_length = "
            f"{config.model.context_length}"
        )
    if training.init_from_state and not training.init_from:
        problems.append("config.training.init_from_state = True: set config.training.init_from to the run it is of")
    packed = [source for source in data.sources if source.partition(":")[0] in ("chat", "retrieval")]
    if packed and not data.document_attention:
        problems.append(
            f"config.data.document_attention = False: what {packed[0]!r} packs into a row would see its "
            f"neighbors there; set it to True"
        )
    if len(data.sources) != len(data.weights):
        problems.append(
            f"config.data.weights = {data.weights}: expected one weight for each of the {len(data.sources)} "
            f"config.data.sources"
        )
    return problems
