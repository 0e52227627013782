"""Exported checkpoints: read back bit for bit, equal logits in transformers, refusals that leave nothing behind."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iha_jax.config import LAYER_KINDS
from iha_jax.evaluation.run import Restored
from iha_jax.model import abstract_parameters, bind
from tests.tiny import tiny
from tests.tiny_tokenizers import huggingface

pytest.importorskip("safetensors")

from iha_jax.export import export, load_exported


def restored(**changes):
    config = tiny(**(dict(model__compute_dtype="float32", model__num_layers=3) | changes))
    rng = np.random.default_rng(0)

    def value(path, leaf):  # of every weight another, norms included
        center = 1 if path[-1].key == "scale" else 0
        return jnp.asarray(rng.normal(center, 0.3, leaf.shape), jnp.float32)

    parameters = jax.tree_util.tree_map_with_path(value, abstract_parameters(config.model))
    return Restored(config, parameters, 7, None, "digest")  # type: ignore[arg-type]


MHA = dict(model__layer_pattern=("mha",), model__width=18)  # heads wider than the model: 6 * 4


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layout", ["plain", "transformers"])
def test_read_back_bit_for_bit(layout, tmp_path):
    pattern = LAYER_KINDS if layout == "plain" else ("mha",)
    layers = len(pattern) + 2  # whole repetitions, and for the long pattern two layers left over
    changes = dict(model__layer_pattern=pattern, model__num_layers=layers, model__mlp="swiglu")
    run = restored(**changes, model__tie_embeddings=False)
    written = export(run, str(tmp_path / "out"))
    config, parameters = load_exported(str(tmp_path / "out"))
    assert config == run.config.model
    assert_same(parameters, run.parameters)
    assert written["layout"] == layout
    assert written["bytes"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(run.parameters))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_plain_layout_says_what_it_holds(tmp_path):
    from safetensors.numpy import load_file

    run = restored()
    assert export(run, str(tmp_path / "out"))["why_plain"] == "it has layers of kind iha_local"
    values = json.loads((tmp_path / "out" / "config.json").read_text())["iha_jax"]
    assert (values["step"], values["layout"], values["tokenizer"]["kind"]) == (7, "plain", "bytes")
    assert values["weights"]["layers.1.attention.alpha_key"] == "s h p = 6 6 3"
    assert values["weights"]["layers.0.attention.collapse"] == "g h p = 6 6 3"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: f"{' '.join(map(str, x.shape))}" for name, x in tensors.items()} == {
        name: text.partition(" = ")[2] for name, text in values["weights"].items()
    }
    layer = run.parameters["groups"]["block_1"]["attention"]["query"][0]
    np.testing.assert_array_equal(tensors["layers.1.attention.query"], layer)


def test_shards_with_an_index(tmp_path):
    run = restored(**MHA)
    written = export(run, str(tmp_path / "out"), shard_bytes=10_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert set(written["files"]) == {*files, "config.json", "model.safetensors.index.json"}
    assert index["metadata"]["total_size"] == written["bytes"]
    assert_same(load_exported(str(tmp_path / "out"))[1], run.parameters)


def test_bfloat16_rounds_to_nearest(tmp_path):
    run = restored(**MHA)
    assert export(run, str(tmp_path / "out"), dtype="bfloat16")["bytes"] == 2 * sum(
        leaf.size for leaf in jax.tree.leaves(run.parameters)
    )
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), run.parameters)
    assert_same(load_exported(str(tmp_path / "out"))[1], rounded)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("LlamaForCausalLM", dict(model__mlp="swiglu", model__tie_embeddings=False)),
        ("Qwen3ForCausalLM", dict(model__mlp="swiglu", model__qk_norm=True, model__num_kv_heads=2)),
        ("ArceeForCausalLM", dict(model__mlp="gelu", model__num_kv_heads=3)),
        ("ApertusForCausalLM", dict(model__mlp="gelu", model__qk_norm=True, model__tie_embeddings=False)),
    ],
)
def test_logits_of_transformers(name, changes, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    run = restored(**MHA, **changes, model__rope_theta=1234.0)
    export(run, str(tmp_path / "out"), shard_bytes=10_000)  # several files
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == name
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = np.random.default_rng(1).integers(0, 257, (2, 19))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(bind(run.config.model, run.parameters)(jnp.asarray(tokens)))
    assert ours.std() > 0.5
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-5 * np.abs(ours).max())


def test_tokenizer_goes_with_the_model(tmp_path):
    spec = huggingface("byte-level", tmp_path)
    run = restored(**MHA, data__tokenizer=spec, model__vocab_size=307)
    export(run, str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "byte-level.json").read_bytes()
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["eos_token"], settings["model_max_length"]) == ("<|endoftext|>", 23)


def test_refusals_leave_nothing(tmp_path, monkeypatch):
    run = restored()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("x")
    with pytest.raises(ValueError, match="holds mine; choose an empty folder"):
        export(run, str(tmp_path / "used"))
    with pytest.raises(ValueError, match="mine is a file, so nothing can be made under it"):
        export(run, str(tmp_path / "used" / "mine" / "out"))
    with pytest.raises(ValueError, match="no class of transformers computes this model: it has layers of kind iha_lo"):
        export(run, str(tmp_path / "out"), layout="transformers")
    monkeypatch.setattr("iha_jax.export._write_config", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run, str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine"]


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match="is no exported model"):
        load_exported(str(tmp_path))
    export(restored(), str(tmp_path / "out"))
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    values["iha_jax"]["model"]["mlp"] = "swiglu"
    values["iha_jax"]["model"]["mlp_width"] = 31
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate: missing\n(.*\n)*.*layers.0.mlp.up: \(24, 29\), expected"):
        load_exported(str(tmp_path / "out"))


def test_command_refuses_a_folder_that_is_no_run(tmp_path):
    command = [sys.executable, "-m", "iha_jax.export", f"--workdir={tmp_path}", f"--output={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not a run directory" in done.stderr
    assert not list(tmp_path.iterdir())
