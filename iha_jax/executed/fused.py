"""What the fused IHA kernels compute for one row, from the geometry that they themselves run with.

Both kernels compute whole blocks, masked pairs included, mix a block again whenever they reach it, and run a per-head
collapse as a global one with zeros. Letters: n query blocks of C tokens, P pseudo-heads, S source heads.
"""

from iha_jax.executed.xla import Work
from iha_jax.ops.pallas import interleaved_gpu_blocks as gpu
from iha_jax.ops.pallas import interleaved_tpu_blocks as tpu


def fused_tpu_work(blocks: tpu.Blocks, *, training: bool = False) -> Work:
    """Each of n query blocks against its ring of R key blocks, those beyond the sequence included: `n R (P C)^2` pairs,
    C queries and R C keys and values mixed, C outputs collapsed. Widths count as padded, to 128.

    Training adds a backward kernel over the same blocks and, with two parts, `before + after` more that both parts
    visit. It computes scores and sums again and two gradients of each: 3 times; mixes queries, keys and values and
    takes two gradients of that: 3; outputs: their gradient and that of the collapse, 2.
    """
    C, forward = blocks.size, blocks.n
    backward = sum(
        min(blocks.n, (part + 1) * blocks.part + blocks.before) - max(0, part * blocks.part - blocks.after)
        for part in range(blocks.parts)
    )
    three, two = (forward + times * backward * training for times in (3, 2))
    wide, wide_values = (
        blocks.padded(blocks.width) / blocks.width,
        blocks.padded(blocks.value_width) / blocks.value_width,
    )
    return Work(
        scores=three * blocks.ring * blocks.rows**2 * wide,
        sums=three * blocks.ring * blocks.rows**2 * wide_values,
        queries=three * C * wide,
        keys=three * blocks.ring * C * wide,
        values=three * blocks.ring * C * wide_values,
        collapsed=two * C * wide_values,
    )


def fused_gpu_work(blocks: gpu.Blocks, *, width: int, value_width: int, training: bool = False) -> Work:
    """n query blocks, and `v` pairs of a query block and a key block in its reach, of X rows each, a power of two.
    Forward: a pair has X^2 pairs of virtual tokens and mixes its keys and values; a query block mixes its queries and
    collapses its outputs. A mixing is a product with a block-diagonal matrix, `X R` multiply-adds a number rather than
    the `C P S` of dense mixing. Widths count as padded, to powers of two.

    Training: the kernel of the queries walks over its pairs twice, that of the keys and values too. Scores
    `1 + 3 + 3 = 7` times, sums `1 + 2 + 2 = 5`; keys and values 3 times a pair (forward, and the first kernel's two
    walks) and 3 times a block (theirs); queries and gradients of outputs twice a pair (the second kernel's two walks)
    and 4 and 3 times a block.
    """
    before, after = blocks.neighbors
    n = blocks.count
    visits = sum(min(i + after + 1, n) - max(i - before, 0) for i in range(n))
    parts = 1 + blocks.rotated
    wide = parts * gpu.power_of_two(width // parts) / width
    wide_values = gpu.power_of_two(value_width) / value_width
    by_query = blocks.X * blocks.rows_of_block(blocks.H) / (blocks.P * blocks.H)  # tokens that dense mixing would mix
    by_key = blocks.X * blocks.rows_of_block(blocks.K) / (blocks.P * blocks.K)
    scores, sums, keys, own_keys, back, queries, outputs = (7, 5, 3, 3, 2, 4, 3) if training else (1, 1, 1, 0, 0, 1, 1)
    return Work(
        scores=scores * visits * blocks.X**2 * wide,
        sums=sums * visits * blocks.X**2 * wide_values,
        queries=(back * visits + queries * n) * by_query * wide,
        keys=(keys * visits + own_keys * n) * by_key * wide,
        values=(keys * visits + own_keys * n) * by_key * wide_values,
        collapsed=(back * visits + outputs * n) * by_query * wide_values,
    )
