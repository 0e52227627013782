"""Geometry of the fused TPU kernel: which blocks see which, in what order they pass, and what fits on the chip.

The sequence is cut into n blocks of C tokens. Key blocks arrive one a grid step and stay on chip in a ring of
`before + 1 + after` blocks, all that one block of queries can see; each is read from device memory once. The grid is
[batch, parts, steps]: a part is an independent stretch of the sequence with its own ring, so that a chip of two cores
has work for both at batch 1.

Shapes: B batch, N tokens, n blocks, C tokens of a block, H heads, K key/value heads, P pseudo-heads, d head width,
e value width; virtual tokens of a block stand pseudo-major, row `p * C + c`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from iha_jax.array_types import Array

ROWS_AT_MOST = 512  # virtual queries of a block: float32 scores against one block of keys are then at most 1 MiB
SMALLEST_BLOCK = 8  # tokens; a float32 register holds 8 rows
RESERVE = 1 / 128  # of VMEM, kept free: the estimate was 0 to 15 % above what the compiler took, in 30 compilations
COMPILER_BYTES = 2**18  # scratch of the compiler's own
LANES = 128  # width of a register: head widths are padded to a multiple
CHIPS = ("v4", "v5e", "v5p", "v6e", "7x")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Everything static about one call. `tokens` counts the real tokens, `n * size` the padded ones."""

    tokens: int
    size: int
    heads: int
    key_heads: int
    P: int
    width: int
    value_width: int
    window: int
    causal: bool
    causality: str
    rope_theta: float | None
    rope_positions: str
    dtype: jnp.dtype
    parts: int = 1
    chip: str | None = None
    vmem_bytes: int | None = None
    interpret: bool | pltpu.InterpretParams = False

    @property
    def n(self) -> int:
        return -(-self.tokens // self.size)

    @property
    def rows(self) -> int:
        """Virtual tokens of a block."""
        return self.P * self.size

    @property
    def before(self) -> int:
        """Blocks before its own that a query can see. Under virtual causality query (m, 0) sees pseudo-keys 1..P-1 of
        token m - window; for P = 1 there are none."""
        reach = self.window if self.causality == "virtual" and self.P > 1 else self.window - 1
        return min(-(-reach // self.size), self.n - 1)

    @property
    def after(self) -> int:
        return 0 if self.causal else self.before

    @property
    def ring(self) -> int:
        """Key blocks on chip."""
        return self.before + 1 + self.after

    @property
    def part(self) -> int:
        """Blocks of a part."""
        return self.n // self.parts

    @property
    def unit(self) -> int:
        """Positions of a token in the mask."""
        return self.P if self.causality == "virtual" else 1

    def rotations(self) -> tuple[Array, Array] | None:
        """Cosines and signed sines [ring, P*C, d] of RoPE for the key blocks in the ring, oldest first; the queries
        are those of block `before`. Scores depend on differences of positions alone, so positions count from the
        oldest block on chip: the angles stay small, and one table serves every step."""
        if self.rope_theta is None:
            return None
        virtual = self.rope_positions == "virtual"
        tokens = np.arange(self.ring * self.size).reshape(self.ring, 1, self.size) * (self.P if virtual else 1)
        positions = (tokens + np.arange(self.P)[:, None] * virtual).reshape(self.ring, self.rows)
        frequencies = self.rope_theta ** (-np.arange(0, self.width, 2, dtype=np.float64) / self.width)
        angles = positions[..., None] * frequencies
        padding = [(0, 0), (0, 0), (0, (self.padded(self.width) - self.width) // 2)]
        cos, sin = np.pad(np.cos(angles), padding), np.pad(np.sin(angles), padding)
        cos, sin = np.concatenate([cos, cos], axis=-1), np.concatenate([-sin, sin], axis=-1)
        return jnp.asarray(cos, jnp.float32), jnp.asarray(sin, jnp.float32)

    def padded(self, width: int) -> int:
        """Width on chip: whole registers; as it is where the kernel is only interpreted."""
        return width if self.interpret else -(-width // LANES) * LANES


def vmem_needed(blocks: Blocks) -> int:
    """Estimated bytes of on-chip memory (VMEM) of the backward kernel, the larger of the two: rings of keys and values
    in the input's dtype and of their gradients in float32, two buffers for each block on its way in or out, scores
    and mask of a query block in float32, mixed keys and values of one head, RoPE tables, and the values in flight."""
    size = blocks.dtype.itemsize
    d, e = blocks.padded(blocks.width), blocks.padded(blocks.value_width)
    C, R, rows, wide = blocks.size, blocks.ring, blocks.rows, d + e

    def tall(count: int) -> int:
        return -(-count // 8) * 8

    heads, keys, P = tall(blocks.heads), tall(blocks.key_heads), tall(blocks.P)
    rings = R * C * wide * keys * (size + 4)
    moving = 2 * max(C, 32 // size) * (blocks.heads * (2 * d + e) + 2 * blocks.key_heads * wide) * size
    queries = C * heads * (wide * size + d * 4)
    attention = R * rows * (2 * rows * 4 + wide * size)
    tables = 0 if blocks.rope_theta is None else 2 * R * rows * d * 4
    weights = blocks.heads * LANES * (3 * P + heads) * (size + 2 * 4)
    in_flight = 3 * rows**2 * 4 + 3 * rows * wide * 4
    return rings + moving + queries + attention + tables + weights + in_flight + COMPILER_BYTES


def choose_block(blocks: Blocks) -> Blocks:
    """The rule: the smallest power of two that holds the window (a query block then reads its own keys and one block
    before), halved until a block has at most `ROWS_AT_MOST` virtual queries and the backward kernel fits into VMEM;
    never under `SMALLEST_BLOCK` tokens.

    Raises:
      ValueError: when not even the smallest block fits. Nothing else is tried: keys and values mixed in advance would
        be P times as many in device memory, which streaming never holds.
    """
    size = max(SMALLEST_BLOCK, 2 ** math.ceil(math.log2(min(blocks.window, blocks.tokens))))
    while size > SMALLEST_BLOCK and size * blocks.P > ROWS_AT_MOST:
        size //= 2
    while True:
        chosen = dataclasses.replace(blocks, size=size)
        needed = vmem_needed(chosen)
        if blocks.vmem_bytes is None or needed <= blocks.vmem_bytes * (1 - RESERVE):
            return chosen
        if size == SMALLEST_BLOCK:
            raise ValueError(
                f"window = {blocks.window} tokens with {blocks.heads} heads of width {blocks.width}, P = {blocks.P}: "
                f"the backward pass of implementation='fused' needs about {needed / 2**20:.0f} MiB of on-chip memory "
                f"(VMEM), and a core of TPU {blocks.chip} has {blocks.vmem_bytes / 2**20:.0f}; use "
                "implementation='streaming', or a smaller window"
            )
        size //= 2


def split(blocks: Blocks, batch: int) -> Blocks:
    """Two parts for an odd batch, so that both cores of a chip have the same work; one where the blocks do not halve.
    A part repeats up to `before + after` blocks of its neighbor."""
    halves = batch % 2 == 1 and blocks.n % 2 == 0 and blocks.n // 2 > blocks.before + blocks.after
    return dataclasses.replace(blocks, parts=2 if halves else 1)


def tpu_info(chip: str | None) -> pltpu.TpuInfo:
    """What is known of one core of `chip` (one of `CHIPS`), or of the default device.

    Raises:
      ValueError: for an unknown chip, or when none is named and the default device is no TPU.
    """
    if chip is not None:
        if chip not in CHIPS:
            raise ValueError(f"chip = {chip!r}; expected one of {', '.join(map(repr, CHIPS))}")
        return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(chip), 1)
    try:
        return pltpu.get_tpu_info()
    except ValueError as error:
        device = jax.devices()[0].device_kind
        raise ValueError(
            f"the fused TPU kernel was asked for on a {device!r} device; name the chip it is compiled for "
            "(target_platform('tpu', chip='v5p')), pass interpret=True to check numbers slowly, or use "
            "implementation='streaming'"
        ) from error
