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
    tokens: int
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
            tokens=q.shape[1],
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
        "gpu": Row(("cudnn", "blockwise")),
        "tpu": Row(("splash", "blockwise")),
    },
    "interleaved_head_attention": {
        # "fused" is by name only until it has run on the hardware it is for: so far it was compiled and interpreted.
        "cpu": Row(("streaming",)),
        "gpu": Row(("streaming",), ("reference", "fused")),
        "tpu": Row(("streaming",), ("reference", "fused")),
    },
    # Talking heads and simplicial attention: they need scores that no flash kernel keeps.
    "blocked_attention": dict.fromkeys(PLATFORMS, Row(("blockwise",))),
}


def cudnn_limits(features: Features) -> str | None:
    """Of `jax.nn.dot_product_attention(implementation="cudnn")`, as jax checks them too."""
    if features.segments:
        return "takes no segment_ids (its mask would be dense, [B, N, N] in memory)"
    if features.window is not None and not features.causal:
        return f"takes a window only together with causal=True, got window = {features.window}, causal = False"
    if features.dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 or float16, got {features.dtype}"
    if features.value_width % features.head_width or not features.value_width:
        return f"takes values as wide as keys ({features.head_width}), or a multiple, got {features.value_width}"
    if features.tokens % 2:
        return f"takes an even number of tokens, got {features.tokens}"
    capability: tuple[int, int] | None = _compute_capability() if jax.default_backend() == "gpu" else (8, 0)
    if capability is None or capability[0] < 8:
        return "needs an NVIDIA GPU of compute capability 8.0 or later"
    widest = 256 if capability[0] >= 9 else 128
    if features.head_width > widest or features.head_width % 8:
        return f"takes head widths that are multiples of 8, at most {widest} on this GPU, got {features.head_width}"
    return None


def splash_limits(features: Features) -> str | None:
    if features.dtype not in ("bfloat16", "float32"):
        return f"takes bfloat16 or float32, got {features.dtype}"
    return None


# name -> why it cannot run a call with these features, or None. Names that are not here run every call, or refuse what
# they cannot run by themselves: "fused", whose limits are the on-chip memory's.
LIMITS: Mapping[str, Callable[[Features], str | None]] = {"cudnn": cudnn_limits, "splash": splash_limits}

# The compiler cannot partition these over devices, so "auto" takes them only for one device or inside `jax.shard_map`.
ONE_DEVICE = ("splash",)

_TARGET = jax.make_user_context(None)  # (platform, devices, chip), per thread, and part of jit's cache key


@contextlib.contextmanager
def target_platform(platform: str, devices: int = 1, chip: str | None = None) -> Iterator[None]:
    """Chooses implementations for "cpu", "gpu" or "tpu" instead of the backend of this process, in this thread.

    For compiling ahead of time for `devices` devices that are not here:

        with target_platform("tpu", devices=mesh.size, chip="v5p"):
            jax.jit(step).lower(...).compile()   # with shardings on a topology's devices

    `chip` ("v4", "v5e", "v5p", "v6e" or "7x") is needed by kernels that divide on-chip memory themselves: "fused" IHA.
    The choice is made while tracing, so tracing has to happen inside the block.

    Raises:
      ValueError: for another platform, no devices, or a chip of another platform than "tpu".
    """
    if platform not in PLATFORMS:
        raise ValueError(f"platform = {platform!r}; expected one of {', '.join(map(repr, PLATFORMS))}")
    if devices < 1:
        raise ValueError(f"devices = {devices}; expected 1 or more")
    if chip is not None and platform != "tpu":
        raise ValueError(f"chip = {chip!r}; expected None for platform {platform!r}: chips are those of TPUs")
    with _TARGET((platform, devices, chip)):
        yield


def current_platform() -> str:
    """The platform implementations are chosen for: `target_platform`'s, else that of `jax.default_backend()`."""
    return _TARGET.value[0] if _TARGET.value else jax.default_backend()


def current_chip() -> str | None:
    """The TPU that `target_platform` names; None for the one of this process."""
    return _TARGET.value[2] if _TARGET.value else None


def partitioned() -> bool:
    """Whether the compiler may have to spread the traced program over devices: several, and not in `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and all(kind == jax.sharding.AxisType.Manual for kind in mesh.axis_types):
        return False
    return (_TARGET.value[1] if _TARGET.value else jax.device_count()) > 1


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
    whole = [other for other in row.automatic if not (other in ONE_DEVICE and partitioned())]
    automatic = next(other for other in whole if other in able)
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


def _compute_capability() -> tuple[int, int] | None:
    """Of the NVIDIA GPU here, such as (9, 0); None for a GPU of another make."""
    text = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
