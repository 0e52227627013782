"""The table of implementations: what "auto" picks, what is refused and how, and that jit never mixes targets up."""

import functools
import sys
import threading
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from iha_jax.config import ConfigError, IhaConfig, ModelConfig
from iha_jax.ops import Features, implementations, interleaved_head_attention, target_platform
from iha_jax.ops.implementations import Row, current_platform, known_names, resolve_implementation
from iha_jax.training.banner import kernels
from tests.tiny import tiny

CALL = Features(dtype="float32", tokens=13, head_width=8, value_width=8)


@pytest.fixture
def operation(monkeypatch):
    """An operation with a quick implementation on GPUs that takes no segments."""
    rows = {"cpu": Row(("plain",)), "gpu": Row(("quick", "plain"), ("reference", "odd"))}
    monkeypatch.setitem(implementations.TABLE, "fable", rows)  # type: ignore[arg-type]
    monkeypatch.setitem(
        implementations.LIMITS,  # type: ignore[arg-type]
        "quick",
        lambda features: "takes no segment_ids" if features.segments else None,
    )
    return "fable"


def test_auto_takes_the_first_that_can_run_the_call(operation):
    segmented = Features(dtype="float32", tokens=13, head_width=8, value_width=8, segments=True)
    assert resolve_implementation(operation, "auto", CALL) == "plain"
    with target_platform("gpu"):
        assert resolve_implementation(operation, "auto", CALL) == "quick"
        assert resolve_implementation(operation, "auto", segmented) == "plain"
        assert resolve_implementation(operation, "odd", segmented) == "odd"
        with pytest.raises(ValueError, match=r"'quick': takes no segment_ids; expected 'auto'.*'plain'"):
            resolve_implementation(operation, "quick", segmented)
    assert known_names(operation) == ("auto", "plain", "reference", "quick", "odd")


def test_refusals_say_why_and_what_works(operation):
    with pytest.raises(ValueError, match=r"'quick': runs on gpu, and this is cpu; expected 'auto'.*'plain', 'ref"):
        resolve_implementation(operation, "quick", CALL)
    with pytest.raises(ValueError, match="'quik'; did you mean 'quick'"):
        resolve_implementation(operation, "quik", CALL)
    with pytest.raises(ValueError, match="None; expected 'auto'"):
        resolve_implementation(operation, None, CALL)  # type: ignore[arg-type]
    with target_platform("tpu"), pytest.raises(ValueError, match="platform 'tpu'"):
        resolve_implementation(operation, "plain", CALL)
    with pytest.raises(ValueError, match="platform = 'cuda'"), target_platform("cuda"):
        pass
    with pytest.raises(ValueError, match="chip = 'v5p'; expected None"), target_platform("gpu", chip="v5p"):
        pass


def test_a_function_jitted_for_one_target_is_traced_again_for_another():
    traced = []

    @jax.jit
    def function(x):
        traced.append(current_platform())
        return x

    x = jnp.ones(3)
    for _ in range(2):
        function(x)
        with target_platform("tpu"):
            function(x)
    assert traced == ["cpu", "tpu"]


def test_a_kernel_the_compiler_cannot_partition_is_not_automatic_on_several_devices():
    def chosen():
        return resolve_implementation("dot_product_attention", "auto", CALL)

    with target_platform("tpu"):
        assert chosen() == "splash"
    with target_platform("tpu", devices=4):
        assert chosen() == "blockwise"
        assert resolve_implementation("dot_product_attention", "splash", CALL) == "splash"
        found = []

        def local(x):
            found.append(chosen())
            return x

        mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spread = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        jax.eval_shape(spread, jax.ShapeDtypeStruct((8,), jnp.float32))
        assert found == ["splash"]


def test_the_target_is_the_threads_own_and_ends_with_the_block():
    seen = []
    with target_platform("tpu"):
        thread = threading.Thread(target=lambda: seen.append(current_platform()))
        thread.start()
        thread.join()
        with target_platform("gpu"):
            seen.append(current_platform())
        seen.append(current_platform())
    assert [*seen, current_platform()] == ["cpu", "gpu", "tpu", "cpu"]


@pytest.mark.parametrize(("platform", "module"), [("tpu", "interleaved_tpu"), ("gpu", "interleaved_gpu")])
def test_fused_iha_is_by_name_and_calls_the_platforms_kernel(monkeypatch, platform, module):
    """The kernels have tests of their own; here, which one is called, with what, and that "auto" does not."""
    calls = []

    def kernel(q, k, v, mixing, **settings):
        calls.append((q.shape, len(mixing), settings))
        return v

    stand_in = types.ModuleType(module)
    stand_in.fused_interleaved_attention = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"iha_jax.ops.pallas.{module}", stand_in)
    shapes = [(1, 6, 2, 4)] * 3 + [(2, 2, 3)] * 4
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def run(name, **settings):
        return jax.eval_shape(
            functools.partial(interleaved_head_attention, implementation=name, **settings), *arguments
        )

    with pytest.raises(ValueError, match=r"'fused': runs on gpu or tpu, and this is cpu; .*'streaming'"):
        run("fused")
    with target_platform(platform):
        run("auto")
        assert calls == []
        run("fused", window=6, causality="token", rope_theta=10.0)
    shape, mixing, settings = calls.pop()
    assert (shape, mixing) == ((1, 6, 2, 4), 4)
    assert settings == dict(
        causal=True, causality="token", window=None, rope_theta=10.0, rope_positions="virtual", segment_ids=None
    )
    assert not calls


def test_a_config_that_names_what_cannot_run_is_refused_with_every_reason():
    config = tiny(model__implementation="cudnn", model__iha__implementation="fused")
    with pytest.raises(ConfigError) as refusal:
        kernels(config)
    assert len(refusal.value.problems) == 2
    assert "config.model.implementation = 'cudnn': runs on gpu, and this is cpu" in str(refusal.value)
    assert "config.model.iha.implementation = 'fused': runs on gpu or tpu" in str(refusal.value)
    with target_platform("gpu"), pytest.raises(ConfigError, match="takes no segment_ids"):
        kernels(tiny(model__implementation="cudnn", model__compute_dtype="bfloat16"))


def test_the_banner_names_what_the_model_runs():
    half = dict(model__compute_dtype="bfloat16", model__context_length=24, model__head_width=8)
    assert kernels(tiny()) == {"iha_local": "streaming", "mha": "blockwise"}
    with target_platform("tpu"):
        assert kernels(tiny()) == {"iha_local": "streaming", "mha": "splash"}
    with target_platform("gpu"):
        assert kernels(tiny(**half))["mha"] == "blockwise"  # document attention has segments
        assert kernels(tiny(**half, data__document_attention=False))["mha"] == "cudnn"


def test_config_accepts_exactly_the_names_of_the_table():
    choices = {
        "dot_product_attention": ModelConfig.__dataclass_fields__["implementation"].metadata["choices"],
        "interleaved_head_attention": IhaConfig.__dataclass_fields__["implementation"].metadata["choices"],
    }
    for operation, names in choices.items():
        assert set(names) == set(known_names(operation))
