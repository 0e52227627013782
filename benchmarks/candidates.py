"""The registry of attention candidates: ours, every implementation name there is, and the rivals. One entry a line."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import rivals, workload
from benchmarks.harness import OUR_PREFIX, Candidate, JaxPrepared, Limits, Prepared
from benchmarks.rivals import Skip
from benchmarks.torch_process import CPU_MEMORY, TorchPrepared
from benchmarks.workload import Workload
from iha_jax.ops import implementations

REFERENCE_TOKENS = 128  # (virtual) tokens up to which the Python loops of `reference` are worth compiling

# The operation of `iha_jax.ops.implementations` that each mechanism is, under which its implementations are found.
OURS = {
    "mha": "dot_product_attention",
    "mha_local": "dot_product_attention",
    "iha": "interleaved_head_attention",
    "iha_local": "interleaved_head_attention",
}


def our_names(mechanism: str) -> list[str]:
    """Every implementation there is of a mechanism, here or on another platform."""
    return [name for name in implementations.known_names(OURS[mechanism]) if name != "auto"]


def registry(limits: Limits) -> list[Candidate]:
    """All candidates, whether or not they can run here."""
    return [
        *(ours(mechanism, name, limits) for mechanism in OURS for name in our_names(mechanism)),
        *(library(mechanism, name, limits) for mechanism in rivals.FORMS for name in rivals.LIBRARIES),
        *(torch(mechanism, limits, compiled=False) for mechanism in rivals.FORMS),
        *(torch(mechanism, limits, compiled=True) for mechanism in rivals.FORMS),
    ]


def default_label(mechanism: str, w: Workload) -> str:
    """The label of what our `implementation="auto"` is here, for calls without a window."""
    features = implementations.Features(
        dtype=w.dtype, tokens=w.tokens, head_width=w.head_width, value_width=w.head_width
    )
    return f"{mechanism} · ours {implementations.resolve_implementation(OURS[mechanism], 'auto', features)}"


def jax_attention(mechanism: str, function: Callable[..., jax.Array], w: Workload, limits: Limits) -> Prepared:
    """`function(workload, *inputs)` and its gradients, compiled for the workload's inputs on the default device."""
    arrays = [jnp.asarray(x, w.dtype) for x in workload.inputs(w, mechanism).values()]
    return JaxPrepared(workload.with_gradients(function, w), arrays, workload.result_names(w, mechanism), limits)


def ours(mechanism: str, implementation: str, limits: Limits) -> Candidate:
    def prepare(w: Workload) -> Prepared:
        count = w.tokens * (w.pseudo_heads if "iha" in mechanism else 1)
        if implementation == "reference" and count > REFERENCE_TOKENS:
            raise Skip(f"Python loops, for tests: not built above {REFERENCE_TOKENS} (virtual) tokens")
        attend = functools.partial(workload.MECHANISMS[mechanism].attend, implementation=implementation)
        return jax_attention(mechanism, attend, w, limits)

    return Candidate(mechanism, f"{OUR_PREFIX}{implementation}", prepare)


def library(mechanism: str, name: str, limits: Limits) -> Candidate:
    attend = functools.partial(rivals.FORMS[mechanism], rivals.LIBRARIES[name])
    label = f"virtual sequence, {name}" if "iha" in mechanism else name
    return Candidate(mechanism, label, lambda w: jax_attention(mechanism, attend, w, limits))


def torch(mechanism: str, limits: Limits, *, compiled: bool) -> Candidate:
    """PyTorch's `scaled_dot_product_attention`; windows are a boolean mask, as in public interleaved code."""

    def prepare(w: Workload) -> Prepared:
        window = w.window * w.pseudo_heads if mechanism.endswith("_local") else None
        request = {"dtype": w.dtype, "backward": w.backward, "rope_theta": w.rope_theta}
        request |= {"window": window, "compiled": compiled, "checked_runs": 2}
        return TorchPrepared("attention", workload.inputs(w, mechanism), request, limits)

    label = "virtual sequence, torch sdpa" if "iha" in mechanism else "torch sdpa"
    return Candidate(mechanism, label + (" compiled" if compiled else ""), prepare, CPU_MEMORY)
