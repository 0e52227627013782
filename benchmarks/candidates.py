"""The registry of attention candidates: ours, every implementation name there is, and the rivals. One entry a line."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import rivals, workload
from benchmarks.harness import Candidate, JaxPrepared, Limits, Prepared
from benchmarks.rivals import Skip
from benchmarks.torch_process import CPU_MEMORY, TorchPrepared
from benchmarks.workload import Workload
from iha_jax.ops import interleaved, softmax_attention

REFERENCE_TOKENS = 128  # (virtual) tokens up to which the Python loops of `reference` are worth compiling

# Where the names of our implementations of each mechanism are found, and what says whether one can run here.
OURS = {
    "mha": (softmax_attention.IMPLEMENTATIONS, softmax_attention.resolve_attention_implementation),
    "mha_local": (softmax_attention.IMPLEMENTATIONS, softmax_attention.resolve_attention_implementation),
    "iha": (interleaved.IMPLEMENTATIONS, interleaved.resolve_interleaved_implementation),
    "iha_local": (interleaved.IMPLEMENTATIONS, interleaved.resolve_interleaved_implementation),
}


def registry(limits: Limits) -> list[Candidate]:
    """All candidates, whether or not they can run here."""
    return [
        *(ours(mechanism, name, limits) for mechanism, (names, _) in OURS.items() for name in names),
        *(library(mechanism, name, limits) for mechanism in rivals.FORMS for name in rivals.LIBRARIES),
        *(torch(mechanism, limits, compiled=False) for mechanism in rivals.FORMS),
        *(torch(mechanism, limits, compiled=True) for mechanism in rivals.FORMS),
    ]


def default_label(mechanism: str) -> str:
    """The label of what our `implementation="auto"` is here."""
    return f"{mechanism} · ours {OURS[mechanism][1]('auto')}"


def jax_attention(mechanism: str, function: Callable[..., jax.Array], w: Workload, limits: Limits) -> Prepared:
    """`function(workload, *inputs)` and its gradients, compiled for the workload's inputs on the default device."""
    arrays = [jnp.asarray(x, w.dtype) for x in workload.inputs(w, mechanism).values()]
    return JaxPrepared(workload.with_gradients(function, w), arrays, workload.result_names(w, mechanism), limits)


def ours(mechanism: str, implementation: str, limits: Limits) -> Candidate:
    def prepare(w: Workload) -> Prepared:
        try:
            OURS[mechanism][1](implementation)
        except ValueError as error:
            raise Skip(str(error)) from error
        count = w.tokens * (w.pseudo_heads if "iha" in mechanism else 1)
        if implementation == "reference" and count > REFERENCE_TOKENS:
            raise Skip(f"Python loops, for tests: not built above {REFERENCE_TOKENS} (virtual) tokens")
        attend = functools.partial(workload.MECHANISMS[mechanism].attend, implementation=implementation)
        return jax_attention(mechanism, attend, w, limits)

    return Candidate(mechanism, f"ours {implementation}", prepare)


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
