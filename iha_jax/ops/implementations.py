"""Which implementation of an attention operation runs where: one table, one rule for "auto", one set of refusals.

A new operation is one more entry of `TABLE`; a new implementation is one more name in its rows and, where it cannot
take every call, one function in `LIMITS`. Everything is decided at trace time from static facts, so the same call on
the same platform always runs the same code; nothing falls back when a kernel fails.

The platform is `jax.default_backend()`, or what `target_platform` says. The target is part of jit's cache key: a
function traced for one target is traced again for another. What the key does not hold is a device chosen by hand
(`jax.default_device`, `jit(..., device=...)`, arrays put on the host's CPU of a GPU machine): wrap such calls in
`target_platform("cpu")`.
"""

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp

from iha_jax.array_types import Array

PLATFORMS = ("cpu", "gpu", "tpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """The static facts of a call that decide what can run it. `window` is None where it hides nothing."""

    dtype: str
    head_width: int
    value_width: int
    causal: bool = True
    window: int | None = None
    segments: bool = False

    @classmethod
    def of(cls, q: Array, v: Array, *, causal: bool, window: int | None, segment_ids: Array | None) -> "Features":
        """Of checked arguments `q [B, N, H, d]`, `v [B, N, K, e]`."""
        return cls(
            dtype=jnp.dtype(q.dtype).name,
            head_width=q.shape[-1],
            value_width=v.shape[-1],
            causal=causal,
            window=None if window is None or window >= q.shape[1] else window,
            segments=segment_ids is not None,
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """What one platform has for one operation: "auto" takes the first of `automatic` that can run the call; `by_name`
    is taken only when asked for."""

    automatic: tuple[str, ...]
    by_name: tuple[str, ...] = ("reference",)

    @property
    def names(self) -> tuple[str, ...]:
        return self.automatic + self.by_name


TABLE: Mapping[str, Mapping[str, Row]] = {
    "dot_product_attention": {
        "cpu": Row(("blockwise",)),
        "gpu": Row(("blockwise",)),
        "tpu": Row(("blockwise",)),
    },
    "interleaved_head_attention": {
        "cpu": Row(("streaming",)),
        "gpu": Row(("streaming",)),
        "tpu": Row(("streaming",)),
    },
}

# name -> why it cannot run a call with these features, or None. Names that are not here run every call.
LIMITS: Mapping[str, Callable[[Features], str | None]] = {}

_TARGET = jax.make_user_context(None)  # per thread, and part of jit's cache key


@contextlib.contextmanager
def target_platform(platform: str) -> Iterator[None]:
    """Chooses implementations for "cpu", "gpu" or "tpu" instead of the backend of this process, in this thread.

    For compiling ahead of time for devices that are not here:

        with target_platform("tpu"):
            jax.jit(step).lower(...).compile()   # with shardings on a topology's devices

    The choice is made while tracing, so tracing has to happen inside the block.

    Raises:
      ValueError: for another platform.
    """
    if platform not in PLATFORMS:
        raise ValueError(f"platform = {platform!r}; expected one of {', '.join(map(repr, PLATFORMS))}")
    with _TARGET(platform):
        yield


def current_platform() -> str:
    """The platform implementations are chosen for: `target_platform`'s, else that of `jax.default_backend()`."""
    return _TARGET.value or jax.default_backend()


def resolve_implementation(operation: str, name: str, features: Features) -> str:
    """The implementation that `implementation=name` of `operation` runs on the current platform.

    Raises:
      ValueError: for a name that does not exist or cannot run this call here, saying why and naming what can; for a
        platform the table does not know.
    """
    rows, platform = TABLE[operation], current_platform()
    if platform not in rows:
        raise ValueError(
            f"implementation = {name!r}: nothing is known about platform {platform!r}; wrap the call in "
            f"target_platform(...) with one of {', '.join(map(repr, rows))}"
        )
    row = rows[platform]
    able = [other for other in row.names if _obstacle(other, features) is None]
    automatic = next(other for other in row.automatic if other in able)
    if name == "auto":
        return automatic
    if name in able:
        return name
    everywhere = dict.fromkeys(other for elsewhere in rows.values() for other in elsewhere.names)
    if name in row.names:
        why = f": {_obstacle(name, features)}"
    elif name in everywhere:
        homes = " or ".join(home for home in rows if name in rows[home].names)
        why = f": runs on {homes}, and this is {platform}"
    else:
        close = difflib.get_close_matches(str(name), everywhere, n=1)
        why = f"; did you mean {close[0]!r}?" if close else ""
    names = ", ".join(map(repr, able))
    raise ValueError(
        f"implementation = {name!r}{why}; expected 'auto' (here {automatic!r}) or one of {names} for this call on "
        f"{platform}"
    )


def known_names(operation: str) -> tuple[str, ...]:
    """Every name that `implementation` of `operation` accepts on some platform, "auto" first."""
    return ("auto", *dict.fromkeys(name for row in TABLE[operation].values() for name in row.names))


def _obstacle(name: str, features: Features) -> str | None:
    return LIMITS[name](features) if name in LIMITS else None
