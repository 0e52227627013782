"""The table of implementations: what "auto" picks, what is refused and how, and that jit never mixes targets up."""

import threading

import jax
import jax.numpy as jnp
import pytest

from iha_jax.ops import Features, implementations, target_platform
from iha_jax.ops.implementations import Row, current_platform, known_names, resolve_implementation

CALL = Features(dtype="float32", head_width=8, value_width=8)


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
    segmented = Features(dtype="float32", head_width=8, value_width=8, segments=True)
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
