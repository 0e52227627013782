"""FLOPs that the named implementations execute: what `accounting.py` counts as useful, and what is computed beside it.

That is: masked pairs of the blocks that are visited, keys mixed again for every chunk that reaches them, chunks that
only pad a step, and in training what the backward pass recomputes. Matrix products alone are counted, one multiply-add
as 2 FLOPs; element-wise work (softmax, masks, RoPE, norms) is left out, 0 to 3 % of what the compiler counts at a head
width of 128. `xla.py` is checked against that count, `fused.py` and splash against products counted as they run.
"""

from iha_jax.executed.model import attention_flops, executed_flops_per_token, layer_work
from iha_jax.executed.xla import Work

__all__ = ["Work", "attention_flops", "executed_flops_per_token", "layer_work"]
