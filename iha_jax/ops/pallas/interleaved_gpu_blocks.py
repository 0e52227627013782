"""What the kernels of `interleaved_gpu` share: the cut into blocks, and the three products of mixing.

A block is C consecutive tokens, C*P virtual tokens in virtual order (t, p), padded to X rows. Arrays over tokens and
heads are held as rows: `[B, rows, width]`, row `n*S + m` for token n, source head m (S = H or K), so that a block's
C*S rows are consecutive. For a block every mixing is then one matrix product with a block-diagonal `E [X, R]`,
`E[(t, p), (t', m)] = [t = t'] alpha[m, h, p]`, the same for every block:

    mixed = E rows           virtual tokens of head h (q~, k~, v~, and R^T dout, as `collapse` is indexed like an alpha)
    rows += E^T tile         the adjoint: gradients back to heads, and the collapse of the forward pass
    dE   += tile rows^T      the gradient of E, of which the block diagonal is kept

Legend: B batch, N tokens, C tokens of a block, H heads, S source heads, P pseudo-heads, h head, i query block, j key
block, X virtual tokens of a block (a power of two), R rows of a block (padded to whole pieces).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from iha_jax.array_types import Array

VIRTUAL_TOKENS = 64  # of a block: see "Block rule" in `interleaved_gpu`
PIECES = (64, 32, 16)  # rows multiplied at once; a tensor-core product needs 16
WARPS = 4
STAGES = 2
MASKED = -1e30  # finite, so that the difference of two masked scores is no NaN

Ref = Any  # a Pallas reference


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count` and 16, the least side of a tensor-core product."""
    return max(16, 1 << (count - 1).bit_length())


def compiler_params() -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Everything static about the virtual sequence and how it is cut."""

    N: int
    H: int
    K: int
    P: int
    C: int
    window: int | None
    causal: bool
    causality: str
    rotated: bool  # by the pseudo-head's part of virtual RoPE, inside the kernels
    scale: float

    @property
    def count(self) -> int:
        return -(-self.N // self.C)

    @property
    def X(self) -> int:  # noqa: N802
        return power_of_two(self.C * self.P)

    def pieces(self, S: int) -> tuple[int, int]:
        """(number of pieces, rows of a piece) of a block with S source heads: the least padding, then the largest."""
        rows = self.C * S
        size = min(PIECES, key=lambda size: (-(-rows // size) * size, -size))
        return -(-rows // size), size

    def rows_of_block(self, S: int) -> int:
        """R: rows read for a block. The last piece may reach into the next block, where E is zero."""
        return math.prod(self.pieces(S))

    def rows(self, S: int) -> int:
        """Rows of a whole array over tokens and S heads: the last block is readable to its last piece."""
        return (self.count - 1) * self.C * S + self.rows_of_block(S)

    @property
    def neighbors(self) -> tuple[int, int]:
        """Key blocks before and after its own that a query block reaches. Under virtual causality query (n, 0) sees
        pseudo-keys 1..P-1 of token n - window; for P = 1 there are none."""
        if self.window is None:
            return self.count, 0 if self.causal else self.count
        reach = self.window if self.causality == "virtual" and self.P > 1 else self.window - 1
        blocks = -(-reach // self.C)
        return blocks, 0 if self.causal else blocks

    def range_around(self, block: Array, before: int, after: int) -> tuple[Array, Array]:
        """First and last + 1 of the blocks from `before` before to `after` after `block` that exist."""
        return jnp.maximum(block - before, 0), jnp.minimum(block + after + 1, self.count)

    def block_ids(self, ids_ref: Ref, b: Array, block: Array) -> Array:
        """[X]: segment ids of a block's virtual tokens, 0 for the rows that only pad it. `ids [B, count * C]`."""
        x = lax.broadcasted_iota(jnp.int32, (self.X,), 0)
        token = jnp.minimum(lax.div(x, jnp.int32(self.P)), self.C - 1)
        return jnp.where(x < self.C * self.P, ids_ref[b, block * self.C + token], 0)

    def visible(self, query_ids: Array, key_ids: Array, blocks_between: Array, axis: int = 0) -> Array:
        """[X, X]: which keys a query sees; queries along `axis`; `blocks_between` = query block - key block."""
        unit = self.P if self.causality == "virtual" else 1
        key = lax.broadcasted_iota(jnp.int32, (self.X,), 0)
        if unit == 1:
            key = lax.div(key, jnp.int32(self.P))
        # The block goes into the vector, not into the matrix: what does not change from block to block is kept in
        # registers, and a vector takes few.
        query = key + blocks_between * (self.C * unit)
        distance = jnp.expand_dims(query, 1 - axis) - jnp.expand_dims(key, axis)
        own, other = jnp.expand_dims(query_ids, 1 - axis), jnp.expand_dims(key_ids, axis)
        allowed = (own == other) & (own != 0)
        if self.causal:
            allowed &= distance >= 0
        if self.window is not None:
            allowed &= jnp.abs(distance) < self.window * unit
        return allowed


def product(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """Matrix product over axes `contract`, accumulated in float32; float32 operands are not shortened to TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def inner_products(left: tuple[Array, ...], right: tuple[Array, ...]) -> Array:
    """Of the rows of two tiles, each in one or two parts along the width: float32."""
    first, *rest = (product(a, b, (1, 1)) for a, b in zip(left, right, strict=True))
    return first + rest[0] if rest else first


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows of S heads and the mixing matrices that belong to them, in the kernel: `rows [B, rows, width]`,
    `E [H, X, R]`. `parts` = 2: the two halves that RoPE pairs are kept apart, since Triton cannot cut a tile."""

    blocks: Blocks
    S: int
    rows_ref: Ref
    E_ref: Ref
    parts: int = 1

    @property
    def width(self) -> int:
        return self.rows_ref.shape[-1] // self.parts

    def _piece(self, block: Array, piece: Array) -> tuple[Any, Any]:
        _, size = self.blocks.pieces(self.S)
        return pl.ds(block * (self.blocks.C * self.S) + piece * size, size), pl.ds(piece * size, size)

    def columns(self, part: int) -> Any:
        return pl.ds(part * self.width, self.width)

    def mix(self, b: Array, block: Array, h: Array) -> tuple[Array, ...]:
        """`E rows` of one block and head, float32, in parts `[X, width]`."""
        pieces, _ = self.blocks.pieces(self.S)

        def add(piece: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            rows, inside = self._piece(block, piece)
            E = self.E_ref[h, :, inside]
            return tuple(
                total + product(E, self.rows_ref[b, rows, self.columns(part)]) for part, total in enumerate(sums)
            )

        zeros = (jnp.zeros((self.blocks.X, self.width), jnp.float32),) * self.parts
        return add(jnp.int32(0), zeros) if pieces == 1 else lax.fori_loop(0, pieces, add, zeros)

    def add_adjoint(self, sums_ref: Ref, index: tuple[Array, Array, Array], tile: tuple[Array, ...]) -> None:
        """`sums_ref[b, rows of block] += E^T tile` of head h, for index = (b, block, h); head 0 overwrites. One program
        owns these rows and takes the heads in turn, so sums have one order: no atomics."""
        (b, block, h), (pieces, size) = index, self.blocks.pieces(self.S)

        def add(piece: Array, _: None) -> None:
            rows, inside = self._piece(block, piece)
            E = self.E_ref[h, :, inside]
            row = piece * size + lax.broadcasted_iota(jnp.int32, (size, self.width), 0)
            for part, x in enumerate(tile):
                place = sums_ref.at[b, rows, self.columns(part)]
                own = row < self.blocks.C * self.S  # the rest belongs to the next block, which adds it itself
                before = plgpu.load(place, mask=own & (h > 0), other=0.0)
                plgpu.store(place, before + product(E, x.astype(E.dtype), (0, 0)), mask=own)

        for_each(pieces, add)

    def add_outer(self, sums_ref: Ref, index: tuple[Array, Array, Array], tile: tuple[Array, ...], slot: Any) -> None:
        """`sums_ref[slot, h] += tile rows^T`, the gradient of E. `slot`: (indices, whether this is its first block)."""
        (b, block, h), (place, first) = index, slot

        def add(piece: Array, _: None) -> None:
            rows, inside = self._piece(block, piece)
            raw = tuple(self.rows_ref[b, rows, self.columns(part)] for part in range(self.parts))
            outer = inner_products(cast(tile, raw[0].dtype), raw)
            at = sums_ref.at[(*place, h, slice(None), inside)]
            everything = jnp.broadcast_to(jnp.logical_not(first), outer.shape)
            plgpu.store(at, plgpu.load(at, mask=everything, other=0.0) + outer)

        for_each(self.blocks.pieces(self.S)[0], add)


def for_each(count: int, step: Any) -> None:
    """`step(i, None)` for its effects."""
    if count == 1:
        step(jnp.int32(0), None)
    else:
        lax.fori_loop(0, count, step, None)


def pair(tables: list[Ref]) -> tuple[Ref, Ref] | None:
    """Cosines and sines as they came with the operands, if they did."""
    return (tables[0], tables[1]) if tables else None


def turn(x: tuple[Array, ...], tables: tuple[Ref, Ref] | None, back: bool = False) -> tuple[Array, ...]:
    """The pseudo-head's part of RoPE on a tile in two halves (or `back`, its transpose); none without tables."""
    if tables is None:
        return x
    (first, second), cos, sin = x, tables[0][...], tables[1][...]
    if back:
        sin = -sin
    return first * cos - second * sin, second * cos + first * sin


def cast(x: tuple[Array, ...], dtype: jax.typing.DTypeLike) -> tuple[Array, ...]:
    return tuple(part.astype(dtype) for part in x)
