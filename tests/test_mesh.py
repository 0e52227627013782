"""Meshes: same losses on every mesh as on one device, the collectives that were meant and no others, named refusals."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from iha_jax.config import LAYER_KINDS, ConfigError, MeshConfig
from iha_jax.model import abstract_parameters
from iha_jax.ops import target_platform
from iha_jax.parallel.mesh import AXES, axis_sizes, check_batch_sizes
from iha_jax.parallel.rules import WEIGHTS, check_split, weight_spec
from iha_jax.training.banner import kernels
from tests.several import printed_by, with_devices
from tests.tiny import tiny

ONE = dict(data=1, fsdp=1, context=1, tensor=1)
MESHES = {
    "one": ONE,
    "data 8": ONE | dict(data=8),
    "fsdp 8": ONE | dict(fsdp=8),
    "fsdp 4 x tensor 2": ONE | dict(fsdp=4, tensor=2),
    "tensor 4 x data 2": ONE | dict(tensor=4, data=2),
    "context 4 x fsdp 2": ONE | dict(context=4, fsdp=2),
}
CONTEXT = {"context 8": ONE | dict(context=8), "context 2 x tensor 2 x data 2": ONE | dict(context=2, tensor=2, data=2)}


@pytest.fixture(scope="module")
def found():
    single = {"context 8": CONTEXT["context 8"]}
    split = {"fsdp 4 x tensor 2": MESHES["fsdp 4 x tensor 2"]}
    alone = {"mha_local": single, "iha_local": single | {"tensor 4": ONE | dict(tensor=4)}}
    return run({"mha": MESHES, "iha": MESHES, "iha_global": split} | alone)


@pytest.fixture(scope="module")
def found_over_context():
    meshes = {"one": ONE} | CONTEXT
    return run({"mha": meshes, "iha": meshes, "iha_global": meshes})


def run(meshes):
    return printed_by("tests.mesh_losses", meshes, devices=8)


@pytest.mark.parametrize("arm", ["mha", "iha"])
@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
def test_every_mesh_gives_the_losses_of_one_device(found, arm, mesh):
    expected = found[f"{arm} one"]["losses"]
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(found[f"{arm} {mesh}"]["losses"], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["mha", "iha", "iha_global"])
@pytest.mark.parametrize("mesh", CONTEXT)
def test_more_meshes_over_context_give_the_losses_of_one_device(found_over_context, arm, mesh):
    expected = found_over_context[f"{arm} one"]["losses"]
    np.testing.assert_allclose(found_over_context[f"{arm} {mesh}"]["losses"], expected, rtol=1e-5)


@pytest.mark.parametrize("arm", ["mha", "iha"])
def test_data_alone_exchanges_gradients_and_nothing_else(found, arm):
    assert {kind for kind, _ in found[f"{arm} data 8"]["collectives"]} == {"all-reduce"}
    for _, result in found[f"{arm} data 8"]["collectives"]:
        assert not re.search(r"\[1,24,", result), "an activation was reduced"


@pytest.mark.parametrize("arm", ["mha", "iha"])
def test_fsdp_gathers_weights_and_no_activations(found, arm):
    """Activations have 1 of 8 rows and 24 tokens on a device, 8 rows when gathered; no weight has such a shape."""
    collectives = found[f"{arm} fsdp 8"]["collectives"]
    assert "all-gather" in {kind for kind, _ in collectives}
    assert {kind for kind, _ in collectives} <= {"all-gather", "all-reduce", "reduce-scatter"}
    for _, result in collectives:
        assert not re.search(r"\[[18],24,24\]|\[[18],24,\d+,4\]", result), result
    # Replicated: norms, and head mixing in IHA. Everything else is held an eighth each.
    assert found[f"{arm} fsdp 8"]["held"] < (0.14 if arm == "mha" else 0.21)


def test_global_iha_over_tensor_gathers_heads_once_and_scatters_outputs(found):
    """Of activations [2 rows, 24 tokens, heads, 4]: q, k and v are gathered, outputs of all heads summed and scattered;
    nothing of P times that size is exchanged. CPU's compiler writes a reduce-scatter as an all-reduce and a slice."""
    largest = 2 * 24 * 8 * 4  # q, or the outputs, of all heads
    for kind, result in found["iha_global fsdp 4 x tensor 2"]["collectives"]:
        for shape in (tuple(map(int, found.split(","))) for found in re.findall(r"\[(\d+,24,[\d,]+)\]", result)):
            assert np.prod(shape) <= largest, (kind, shape)
    gathered = [result for kind, result in found["iha_global fsdp 4 x tensor 2"]["collectives"] if kind == "all-gather"]
    assert any("[2,24,8,4]" in result for result in gathered)
    assert any("[2,24,4,4]" in result for result in gathered)


def test_local_iha_over_tensor_swaps_heads_for_tokens_and_gathers_none(found):
    """4 devices with one key head each get all 4 of 6 tokens, and a halo of 3 tokens from the neighbor."""
    run = found["iha_local tensor 4"]
    permuted = [result for kind, result in run["collectives"] if kind == "collective-permute"]
    assert {abs(source - target) for pairs in run["pairs"] for source, target in pairs} == {1}
    assert any(re.search(r"f32\[\d+,3,4,4\]", result) for result in permuted)
    assert swapped(run)
    hybrid, mha = (found[f"{arm} fsdp 4 x tensor 2"]["collectives"] for arm in ("iha", "mha"))
    for kind, result in [*run["collectives"], *hybrid, *mha]:
        assert kind != "all-gather" or not re.search(r"\[\d+,24,\d+,4\]", result), "heads were gathered"


@pytest.mark.parametrize("arm", ["mha_local", "iha_local"])
def test_local_layers_exchange_a_halo_with_their_neighbors_and_gradients(found, arm):
    """8 devices of 3 tokens. A window of 7 reaches 6 tokens, in two exchanges; IHA's of 3 tokens reaches 3."""
    run, rows = found[f"{arm} context 8"], 8 if arm == "mha_local" else 4  # IHA's accumulates over two halves
    assert {kind for kind, _ in run["collectives"]} == {"all-reduce", "collective-permute"}
    assert {abs(source - target) for pairs in run["pairs"] for source, target in pairs} == {1}
    halos = Counter(result for kind, result in run["collectives"] if kind == "collective-permute")
    passes = 2 if arm == "mha_local" else 1
    # Keys and values of K = 4 heads forward, their gradients backward; segment ids once.
    assert {result.split("{")[0]: count for result, count in halos.items()} == {
        f"s32[{rows},3]": passes,
        f"f32[{rows},3,4,4]": 4 * passes,
    }
    for kind, result in run["collectives"]:
        assert kind != "all-reduce" or not re.search(rf"\[{rows},(3|24)[,\]]", result), "an activation was reduced"


def swapped(run):
    """How many values a device gives and gets in each all-to-all, whose result may be a tuple, a piece a device."""
    results = [result for kind, result in run["collectives"] if kind == "all-to-all"]
    shapes = [re.findall(r"\[([\d,]+)\]", result) for result in results]
    return Counter(sum(int(np.prod([int(n) for n in shape.split(",")])) for shape in found) for found in shapes)


def test_global_layers_over_context_swap_heads_for_tokens(found):
    """4 rows of 6 tokens on a device: q, outputs and their gradients of 8 heads of 4; k, v and gradients of 4 heads."""
    assert swapped(found["mha context 4 x fsdp 2"]) == {4 * 6 * 8 * 4: 4, 4 * 6 * 4 * 4: 4}


@pytest.mark.slow
def test_global_layers_over_context_gather_segment_ids_alone(found_over_context):
    """8 rows of 3 tokens; the 4 key heads are repeated for 8 devices."""
    run = found_over_context["mha context 8"]
    assert {kind for kind, _ in run["collectives"]} == {"all-to-all", "all-gather", "all-reduce"}
    assert {result.split("{")[0] for kind, result in run["collectives"] if kind == "all-gather"} == {"s32[8,24]"}
    assert swapped(run) == {8 * 3 * 8 * 4: 8}


@pytest.mark.slow
def test_global_iha_over_context_gathers_rows_and_scatters_outputs(found_over_context):
    """q, k and v forward and their gradients backward, the outputs [8 rows, 24 tokens, 8 heads, 4] the other way."""
    activations = Counter(
        (kind, result.split("{")[0])
        for kind, result in found_over_context["iha_global context 8"]["collectives"]
        if kind != "all-reduce"
    )
    assert activations == {
        ("all-gather", "s32[8,24]"): 1,
        ("all-gather", "f32[8,24,4,4]"): 2,
        ("all-gather", "f32[8,24,8,4]"): 2,
        ("reduce-scatter", "f32[8,3,4,4]"): 2,
        ("reduce-scatter", "f32[8,3,8,4]"): 2,
    }


def test_every_weight_of_every_kind_has_one_rule_and_every_rule_a_weight():
    used = set()
    for kind in LAYER_KINDS:
        config = tiny(
            model__layer_pattern=(kind,), model__qk_norm=True, model__mlp="swiglu", model__tie_embeddings=False
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_parameters(config.model)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            weight_spec(name, leaf.ndim)
            used |= {end for end in WEIGHTS if f"/{name}".endswith(f"/{end}")}
    assert used == set(WEIGHTS)


def test_a_weight_without_a_rule_and_a_wrong_rank_raise():
    with pytest.raises(ValueError, match=r"groups/block_0/attention/query_2: 0 partition rules match \(none\)"):
        weight_spec("groups/block_0/attention/query_2", 4)
    with pytest.raises(ValueError, match=r"mlp/up has 2 dimensions"):
        weight_spec("groups/block_0/mlp/up", 2)


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ((-1, 1, 1, 1), 8, (8, 1, 1, 1)),
        ((1, -1, 1, 2), 8, (1, 4, 1, 2)),
        ((1, 2, -1, 2), 8, (1, 2, 2, 2)),
        ((2, 2, 1, 2), 8, (2, 2, 1, 2)),
        ((3, 1, -1, 1), 8, "their product 3 must divide the 8 devices: 1, 2, 4, 8"),
        ((2, 1, 2, 1), 8, "their product 4 must be the 8 devices"),
        ((-1, -1, 1, 1), 8, "data and fsdp are both -1"),
    ],
)
def test_axis_sizes_are_inferred_or_refused(sizes, devices, expected):
    config = MeshConfig(**dict(zip(AXES, sizes, strict=True)))
    if isinstance(expected, tuple):
        assert tuple(axis_sizes(config, devices).values()) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            axis_sizes(config, devices)


@pytest.mark.parametrize(
    ("axes", "changes", "message"),
    [
        ((1, 5, 1, 1), {}, "config.model.width = 24: does not divide over config.mesh.fsdp = 5; choose 20 or 25"),
        ((1, 1, 1, 4), dict(num_heads=6), "config.model.num_heads = 6: does not divide over config.mesh.tensor = 4"),
        (
            (1, 1, 4, 1),
            {},
            "context_length = 23: does not divide over config.mesh.context = 4; choose 20 or 24",
        ),
        ((1, 1, 1, 2), dict(layer_pattern=("talking_heads",)), "config.mesh.tensor = 2: talking heads mix the logits"),
        ((1, 1, 2, 1), dict(layer_pattern=("talking_heads",)), "config.mesh.context = 2: talking heads mix the logits"),
        ((1, 1, 1, 2), dict(layer_pattern=("differential",)), "config.mesh.tensor = 2 in pairs; choose 4 or 8"),
    ],
)
def test_models_that_do_not_split_are_refused_by_field(axes, changes, message):
    settings = {"model__vocab_size": 264, "model__mlp_width": 40, **{f"model__{k}": v for k, v in changes.items()}}
    with pytest.raises(ConfigError, match=message):
        check_split(tiny(**settings).model, AbstractMesh(axes, AXES))


def test_a_loss_chunk_that_does_not_divide_is_refused_with_the_nearest_that_do():
    config = tiny(model__context_length=24, training__loss_chunk=6)
    check_batch_sizes(config, AbstractMesh((1, 1, 2, 1), AXES))
    with pytest.raises(ConfigError, match=r"loss_chunk = 6: does not divide .*mesh.context = 4; choose 4 or 8"):
        check_batch_sizes(config, AbstractMesh((1, 1, 4, 1), AXES))


def test_kernels_without_segments_are_refused_for_local_layers_over_context():
    config = tiny(
        model__layer_pattern=("mha_local", "mha"),
        model__implementation="cudnn",
        model__compute_dtype="bfloat16",
        model__context_length=24,
        model__head_width=8,
        data__document_attention=False,
    )
    with target_platform("gpu"):
        assert kernels(config) == {"mha_local": "cudnn", "mha": "cudnn"}
        with pytest.raises(ConfigError, match=r"takes no segment_ids .*'mha_local', whose halo") as refused:
            kernels(config, AbstractMesh((1, 1, 2, 1), AXES))
    assert len(refused.value.problems) == 1


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tmp_path):
    """Ten steps on fsdp 2 x context 2 x tensor 2, ten more on one device: losses and largest logits of one device."""

    def train(workdir, devices, **settings):
        sizes = dict(context_length=64, width=32, mlp_width=64, vocab_size=264, num_layers=2)
        training = dict(eval_every=10, checkpoint_every=10, eval_rows=16, log_every=1, steps=20)
        flags = [f"--config.model.{name}={value}" for name, value in sizes.items()]
        flags += [f"--config.training.{name}={value}" for name, value in training.items()]
        flags += [f"--config.mesh.{name}={value}" for name, value in settings.items()]
        flags += ["--config.model.layer_pattern=iha_local,mha", "--config.optimizer.warmup_steps=3"]
        command = [sys.executable, "train.py", "--config=configs/base.py", f"--workdir={workdir}", *flags]
        subprocess.run(command, cwd=Path(__file__).parent.parent, env=with_devices(devices), check=True)
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return [row[name] for row in rows for name in ("loss", "largest_attention_logit") if name in row]

    expected = train(tmp_path / "one", 1)
    train(tmp_path / "moved", 8, fsdp=2, context=2, tensor=2)
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "20")
    np.testing.assert_allclose(train(tmp_path / "moved", 1), expected, rtol=1e-5)
