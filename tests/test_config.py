"""Configs: every bad value is refused with a message that names it, all at once; files and overrides are read right."""

import math
import re
from pathlib import Path

import pytest

from configs import base
from iha_jax.accounting import count_parameters
from iha_jax.config import ConfigError, as_dict, default_iha_window, resolve
from iha_jax.config_file import load_config, load_module


def changed(**changes):
    config = base.get_config().to_dict()
    for path, value in changes.items():
        place = config
        *sections, key = path.split("__")
        for section in sections:
            place = place[section]
        place[key] = value
    return config


def test_base_config_resolves_and_round_trips():
    config = resolve(base.get_config())
    assert config.model.head_width == 32
    assert config.model.num_kv_heads == 4
    assert resolve(as_dict(config)) == config
    assert hash(config.model) == hash(resolve(as_dict(config)).model)


@pytest.mark.parametrize(
    ("context", "pseudo_heads", "window"), [(8192, 20, 10), (8192, 2, 1024), (1024, 8, 8), (16, 8, 1), (13, 1, 6)]
)
def test_iha_window_is_frozen_from_the_training_context(context, pseudo_heads, window):
    assert default_iha_window(context, pseudo_heads) == window
    config = resolve(changed(model__context_length=context, model__iha__pseudo_heads=pseudo_heads))
    assert config.model.iha.window == window


BAD = {
    "misspelt": (dict(model__widht=64), "config.model.widht = 64: no such key; did you mean config.model.width?"),
    "bool for int": (dict(model__width=True), "config.model.width = True"),
    "float for int": (dict(training__steps=10.5), "config.training.steps = 10.5"),
    "string for number": (dict(optimizer__learning_rate="high"), "config.optimizer.learning_rate = 'high'"),
    "none": (dict(training__steps=None), "config.training.steps = None"),
    "nan": (dict(optimizer__learning_rate=math.nan), "config.optimizer.learning_rate = nan"),
    "inf": (dict(model__rope_theta=math.inf), "config.model.rope_theta = inf"),
    "negative": (dict(training__batch_size=-8), "config.training.batch_size = -8"),
    "zero": (dict(model__num_layers=0), "config.model.num_layers = 0"),
    "int for bool": (dict(model__qk_norm=1), "config.model.qk_norm = 1: expected True or False"),
    "above one": (dict(optimizer__final_fraction=1.5), "config.optimizer.final_fraction = 1.5"),
    "choice": (dict(model__mlp="swiglue"), "did you mean 'swiglu'?"),
    "layer kind": (dict(model__layer_pattern=("mha", "ihalocal")), "config.model.layer_pattern[1] = 'ihalocal'"),
    "empty pattern": (dict(model__layer_pattern=()), "config.model.layer_pattern = ()"),
    "pattern is a string": (dict(model__layer_pattern="mha"), "config.model.layer_pattern = 'mha'"),
    "long pattern": (dict(model__layer_pattern=("mha",) * 9), "shorten the pattern"),
    "section is a value": (dict(model=3), "config.model = 3: expected a section"),
    "heads": (dict(model__num_heads=3), "config.model.num_heads = 3: does not divide"),
    "kv heads": (dict(model__num_kv_heads=3), "choose one of 1, 2, 4"),
    "odd head": (dict(model__head_width=31), "must be even"),
    "mha window": (
        dict(model__layer_pattern=("mha_local",), model__window=512),
        "config.model.window = 512: larger than config.model.context_length = 256",
    ),
    "iha window": (
        dict(model__layer_pattern=("iha_local",), model__iha__window=257),
        "config.model.iha.window = 257: larger",
    ),
    "simplicial window": (
        dict(model__layer_pattern=("simplicial_local",), model__simplicial__second_window=257),
        "config.model.simplicial.second_window = 257: larger than config.model.context_length = 256; choose at most "
        "256, or layers of kind 'simplicial'",
    ),
    "differential heads": (
        dict(model__layer_pattern=("differential",), model__num_kv_heads=1),
        "config.model.num_heads = 4 with num_kv_heads = 1: layers of kind 'differential' halve both",
    ),
    "accumulation": (dict(training__accumulation=3), "choose one of 1, 2, 4, 8"),
    "warm-up": (dict(optimizer__warmup_steps=500), "must be below config.training.steps - 1 = 499"),
    "loss chunk": (dict(training__loss_chunk=100), "does not divide config.model.context_length = 256"),
    "weights": (dict(data__weights=(1.0, 2.0)), "one weight for each of the 1"),
    "weight": (dict(data__weights=(0.0,)), "config.data.weights[0] = 0.0"),
    "collapse": (dict(model__iha__collapse="perhead"), "did you mean 'per_head'?"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_by_name(name):
    changes, message = BAD[name]
    with pytest.raises(ConfigError) as error:
        resolve(changed(**changes))
    assert message in str(error.value)
    assert len(error.value.problems) == 1


def test_all_problems_come_in_one_message():
    with pytest.raises(ConfigError) as error:
        resolve(changed(model__widht=1, training__steps=-5, optimizer__learning_rate=math.nan, model__mlp="relu"))
    assert len(error.value.problems) == 4
    assert str(error.value).startswith("the config has 4 problems:")


def test_missing_key_is_named():
    values = base.get_config().to_dict()
    del values["training"]["steps"]
    with pytest.raises(ConfigError, match=r"config\.training\.steps is missing"):
        resolve(values)


def test_overrides_are_read_as_the_kind_of_the_default():
    config = load_config(
        "configs/quickstart.py:iha",
        [
            "model.width=64",
            "optimizer.learning_rate=1e-3",
            "model.layer_pattern=iha_local,mha",
            "data.weights=2",
            "model.qk_norm=true",
            "data.tokenizer=bytes",
        ],
    )
    assert config.model.width == 64
    assert config.optimizer.learning_rate == 1e-3
    assert config.model.layer_pattern == ("iha_local", "mha")
    assert config.data.weights == (2.0,)
    assert config.model.qk_norm is True


def test_bad_overrides_and_bad_values_come_together():
    with pytest.raises(ConfigError) as error:
        load_config(
            "configs/base.py", ["modle.width=3", "model.width=nan", "model.wdth=1", "model=3", "seed", "seed=1.5"]
        )
    text = str(error.value)
    for part in ("did you mean config.model?", "config.model.width = nan", "config.model.width?", "is a section"):
        assert part in text
    assert len(error.value.problems) == 6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("configs/nothing.py", "no such file; config files: configs/ablations_cpu.py, configs/base.py"),
        ("configs/quickstart.py:ihaa", "did you mean 'iha'?"),
        ("configs/base.py:iha", "has no arms"),
    ],
)
def test_unknown_files_and_arms(spec, message):
    with pytest.raises(ConfigError) as error:
        load_config(spec)
    assert message in str(error.value).replace("\n", " ")


def every_config():
    for path in sorted(Path("configs").glob("*.py")):
        module = load_module(str(path))
        for arm in getattr(module, "ARMS", ("",)) if hasattr(module, "get_config") else ():
            yield f"{path}:{arm}".rstrip(":")


@pytest.mark.parametrize("spec", every_config())
def test_every_config_file_is_valid_and_has_the_size_its_header_says(spec):
    config = load_config(spec)
    text = Path(spec.partition(":")[0]).read_text()
    total = f"{count_parameters(config.model).total:,}".replace(",", " ")
    stated = re.findall(r"\| (\d[\d ]+?) *\|$", text, flags=re.MULTILINE)
    assert not stated or total in stated
    shards = {"configs/paper_2p4b.py": 128, "configs/paper_2p4b_64k.py": 32}.get(spec.partition(":")[0], 1)
    assert config.training.batch_size // config.training.accumulation % shards == 0
    assert config.training.eval_batch_size % shards == 0
