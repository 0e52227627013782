"""Plans: topologies by name, collectives of a compiled program counted as often as they run, the command's refusals."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from iha_jax.accounting import count_parameters
from iha_jax.config import ConfigError
from iha_jax.config_file import load_config
from iha_jax.parallel.topology import CHIPS, TopologyError, known_topologies, parse_topology
from iha_jax.planning.hlo import Collective, collectives, parse, shape_bytes, times_run
from iha_jax.planning.search import factorizations, memory_estimate, search, settings
from tests.tiny import tiny

ROOT = Path(__file__).parent.parent
KEYS = ("arguments", "temporaries", "output", "total", "capacity")
SMALL = dict(
    context_length=512, width=256, mlp_width=512, num_layers=3, num_heads=2, vocab_size=512, compute_dtype="bfloat16"
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)

PROGRAM = """HloModule jit_step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (x: f32[64,3]) -> f32[32,3] {
  %x = f32[64,3]{1,0} parameter(0)
  %reduced = f32[64,3]{1,0} all-reduce(%x), channel_id=7, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %own = f32[32,3]{1,0} dynamic-slice(%reduced), dynamic_slice_sizes={32,3}
}

%async_collective_fusion.1 (x: bf16[3]) -> bf16[12] {
  %x.2 = bf16[3]{0} parameter(0)
  ROOT %piece = bf16[12]{0} all-gather(%x.2), channel_id=9, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%fused_computation.1 (x: bf16[3]) -> bf16[12] {
  %x.3 = bf16[3]{0} parameter(0)
  ROOT %first = bf16[12]{0} all-gather(%x.3), channel_id=9, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%inner (p: (s32[], bf16[5,7])) -> (s32[], bf16[5,7]) {
  %spread = bf16[12]{0} fusion(%p), kind=kOutput, calls=%async_collective_fusion.1
  %p = (s32[], bf16[5,7]) parameter(0)
  %gathered = bf16[20,7]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %t = (s32[], bf16[5,7]) tuple(%p)
}

%inner_condition (p: (s32[], bf16[5,7])) -> pred[] {
  %limit = s32[] constant(3)
  %i = s32[] parameter(0)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%outer (p: (s32[], bf16[5,7])) -> (s32[], bf16[5,7]) {
  %q = (s32[], bf16[5,7]) parameter(0)
  %loop = (s32[], bf16[5,7]) while(%q), condition=%inner_condition, body=%inner
  %sent = (f32[11]{0}, f32[11]{0}, u32[], u32[]) collective-permute-start(%q), source_target_pairs={{0,1},{1,0}}
  %done = f32[11]{0} collective-permute-done(%sent)
  %started = bf16[12]{0} fusion(%q), kind=kCustom, calls=%fused_computation.1
  ROOT %t.1 = (s32[], bf16[5,7]) tuple(%loop)
}

%outer_condition (p: (s32[], bf16[5,7])) -> pred[] {
  ROOT %never = pred[] parameter(0)
}

ENTRY %main (x: f32[64,3]) -> f32[32,3] {
  %x.1 = f32[64,3]{1,0:T(8,128)} parameter(0)
  %loops = (s32[], bf16[5,7]) while(%x.1), condition=%outer_condition, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %whole = (f32[13]{0}, f32[13]{0}) all-reduce-start(%x.1, %x.1), replica_groups={}, to_apply=%add
  %far = (f32[17]{0}, u32[], token[]) recv(%x.1), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %scattered = f32[32,3]{1,0} fusion(%x.1), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_collectives_count_once_for_every_iteration_of_the_loops_around_them():
    listed = collectives(PROGRAM, 8)
    spread = next(c for c in listed if c.result_bytes == 24)
    assert spread.times == 5, "pieces of one collective were counted as several"
    assert spread.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    found = {(c.kind, c.between_slices): c for c in listed if c is not spread}
    assert (len(listed), len(found)) == (6, 5)
    gathered = found["all-gather", False]
    assert gathered.times == 5 * 3
    assert gathered.groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert gathered.moved_bytes(4) == 20 * 7 * 2 * 3 / 4
    permuted = found["collective-permute", False]
    assert (permuted.times, permuted.moved_bytes(2)) == (5, 44)
    whole = found["all-reduce", False]
    assert (whole.times, whole.groups, whole.moved_bytes(8)) == (1, (), 2 * 7 / 8 * 2 * 13 * 4)
    scattered = found["reduce-scatter", False]
    assert scattered.result_bytes == 32 * 3 * 4
    assert scattered.moved_bytes(2) == 32 * 3 * 4
    assert found["all-reduce", True].result_bytes == 17 * 4


def test_collectives_of_a_real_program_in_a_loop():
    """A scan of 7 steps, each with a sum over devices: on one device there is none, so the loop alone is checked."""
    compiled = jax.jit(lambda x: jax.lax.scan(lambda c, _: (jax.numpy.sin(c) @ c, None), x, None, length=7)[0])
    text = compiled.lower(jax.ShapeDtypeStruct((3, 3), jax.numpy.float32)).compile().as_text()
    computations, entry = parse(text)
    assert max(times_run(computations, entry).values()) == 7
    assert collectives(text, 1) == []


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,3},{1,2}}", ((0, 3), (1, 2))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
        ("mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
    ],
)
def test_groups_of_devices_in_every_spelling(written, groups):
    program = (
        f"ENTRY %main (x: f32[1]) -> f32[2] {{\n  %y = f32[2] all-gather(%x), replica_groups={written}, d={{0}}\n}}"
    )
    assert collectives(program, 4)[0].groups == groups


def test_bytes_of_types():
    assert shape_bytes("(bf16[3,5]{1,0:T(8,128)(2,1)}, f32[], pred[7], s4[6])") == 30 + 4 + 7 + 3
    assert Collective("all-gather", 8.0, 1, (), "x").moved_bytes(1) == 0
    with pytest.raises(ValueError, match="no entry computation"):
        parse("nothing")


@pytest.mark.parametrize(
    ("name", "devices", "chips"),
    [
        ("v4:2x2x1", 4, 4),
        ("v5e:16x16", 256, 256),
        ("v5p:4x4x8", 128, 128),
        ("tpu7x:2x2x1", 8, 4),
        ("h100:16x8", 128, 128),
    ],
)
def test_topologies_by_name(name, devices, chips):
    topology = parse_topology(name)
    assert (topology.devices, topology.chips, topology.name) == (devices, chips, name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p-256", r"v5p-256 \(256 cores, 128 chips\) is v5p:4x4x8"),
        ("v5p-8", "is v5p:2x2x1"),
        ("v5litepod-16", r"v5litepod-16 \(16 chips\) is v5e:4x4"),
        ("v6e-4", "is v6e:2x2"),
        ("v5e:16x8", r"did you mean v5e:8x16\? v5e has v5e:1x1, .*v5e:16x16"),
        ("v5p:4x8x4", r"did you mean v5p:4x4x8\?"),
        ("v5p:3x3x3", r"did you mean v5p:.*v5p has v5p:1x1x1"),
        ("v5x:2x2", "did you mean v5e|did you mean v5p"),
        ("h100:16", "h100:16x8"),
        ("h100:2x16", "at most 8 GPUs a node"),
        ("", "generations are spelt as in"),
    ],
)
def test_unknown_topologies_are_refused_with_the_nearest(name, message):
    with pytest.raises(TopologyError, match=message):
        parse_topology(name)


def test_slices():
    assert parse_topology("v5p:4x4x8", 2).devices == 256
    with pytest.raises(TopologyError, match="--num_slices=0"):
        parse_topology("v5p:4x4x8", 0)
    with pytest.raises(TopologyError, match="write more nodes"):
        parse_topology("h100:16x8", 2)
    assert all(topology.chip is CHIPS[name] for name in CHIPS for topology in known_topologies(name))


def test_search_estimates_every_mesh_that_train_would_accept():
    config = tiny(model__width=24, model__vocab_size=264, model__mlp_width=32, training__batch_size=4)
    found = list(settings(config, parse_topology("v5e:2x2")))
    meshes = {tuple(setting.mesh.values()) for setting in found}
    assert meshes <= set(factorizations(4, len(next(iter(meshes)))))
    assert any(mesh[:3] == (4, 1, 1) for mesh in meshes)
    assert all(jax.numpy.prod(jax.numpy.asarray(mesh)) == 4 for mesh in meshes)
    assert all(setting.memory > 12 * count_parameters(config.model).total / 4 for setting in found)
    one = {axis: 1 for axis in next(iter(found)).mesh}
    assert memory_estimate(config, one) > memory_estimate(config, one | {"fsdp": 4})


def test_search_refuses_a_batch_that_no_mesh_splits():
    config = tiny(training__batch_size=1, training__eval_batch_size=1, model__width=23, model__head_width=4)
    with pytest.raises(ConfigError, match=r"no mesh of 16 devices splits it"):
        search(config, parse_topology("v5e:4x4"), print)


def plan(*flags):
    command = [sys.executable, "-m", "iha_jax.plan", "--config=configs/base.py", *flags]
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_refusals_exit_with_2_and_write_nothing(tmp_path):
    refused = plan("--topology=v5p-8", f"--out={tmp_path / 'plan.json'}")
    assert refused.returncode == 2
    assert refused.stderr.startswith("refused: --topology=v5p-8: no such topology")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config.mesh.fsdp=3",), "their product 3 must divide the 2 devices: 1, 2"),
        (("--config.training.batch_size=7",), "config.training.batch_size = 7"),
        (("--config.model.implementation=splahs",), "did you mean 'splash'?"),
        (("--config.mesh.tensor=2", "--config.model.num_heads=1", "--config.model.width=128"), "num_heads = 1"),
    ],
)
def test_configs_that_cannot_be_split_are_refused(flags, message):
    refused = plan("--topology=h100:1x2", *flags)
    assert refused.returncode == 2
    assert message in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("topology", [pytest.param("v5e:2x2", marks=needs_libtpu), "h100:2x2"])
def test_a_plan_has_what_was_promised(topology, tmp_path):
    settings = [f"model.{name}={value}" for name, value in SMALL.items()]
    settings += ["mesh.data=1", "mesh.fsdp=-1", "model.remat=full", "model.layer_pattern=iha_local,iha_local,mha"]
    out = tmp_path / "plan.json"
    done = plan(f"--topology={topology}", f"--out={out}", *(f"--config.{setting}" for setting in settings))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    config = load_config("configs/base.py", settings)
    assert found["parameters"] == count_parameters(config.model).total
    assert set(KEYS) <= set(found["bytes_per_device"])
    assert (found["devices"], found["fits"]) == (4, True)
    assert found["bytes_per_device"]["arguments"] > 12 * found["parameters"] / 4
    assert found["flops_per_step"]["executed"] > found["flops_per_step"]["model"]
    assert found["flops_per_step"]["compiler"] > 0
    assert 0 < found["mfu_estimate"] < 1
    assert found["step_seconds_estimate"] > 0
    assert "all-gather" in found["collectives"]


def test_committed_plans_fit_and_have_every_key():
    plans = {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs" / "plans").glob("*.json")}
    assert {f"{where}_{arm}" for where in ("v5p_4x4x8", "v5e_16x16") for arm in ("iha", "global")} <= set(plans)
    for name, found in plans.items():
        assert found["fits"], name
        assert set(KEYS) <= set(found["bytes_per_device"]), name
    for where in ("v5p_4x4x8", "v5e_16x16"):
        iha, mha = (plans[f"{where}_{arm}"]["bytes_per_device"]["total"] for arm in ("iha", "global"))
        assert iha <= 1.05 * mha, where


def test_collectives_written_out_in_shard_map_are_told_apart_though_all_have_channel_1():
    line = next(line for line in PROGRAM.splitlines() if "channel_id=1," in line)
    before = collectives(PROGRAM, 8)
    after = collectives(PROGRAM.replace(line, line + "\n" + line.replace("%gathered", "%gathered.2")), 8)
    assert len(after) == len(before) + 1
