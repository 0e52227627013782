"""The statements about CPM-3 and their checks (`cpm3.py` has the constructions)."""

import itertools
import math

import jax.numpy as jnp
import numpy as np

from iha_jax.ops import interleaved_head_attention
from iha_jax.theory import cpm3
from iha_jax.theory.cpm3 import Task
from iha_jax.theory.layers import (
    cold_queries,
    cold_softmax_attention,
    count_parameters,
    project,
)
from iha_jax.theory.statements import Outcome, Statement

WORKED_EXAMPLE = np.array([[1, 2, 3, 4]])
APPENDIX_EXAMPLE = np.array([1, 2, 3])  # with G = 10, counts 3
TOLERANCE = 1e-12
N_MAX = (1, 3, 5, 6)  # for all workspaces; perfect squares, or not


def all_sequences(task: Task) -> np.ndarray:
    """Every sequence of 1 to N_max tokens, padded: [sum_N M^N, N_max]."""
    by_length = (itertools.product(range(task.M), repeat=N) for N in range(1, task.N_max + 1))
    return np.concatenate([task.padded(np.array(list(sequences))) for sequences in by_length])


def cyclic_shifts(task: Task, sequences: np.ndarray) -> np.ndarray:
    """The workspace by definition: entry (i, s) is the token at `i + s` modulo N_max, or padding."""
    return np.stack([np.roll(task.padded(sequences), -s, axis=1) for s in range(task.N_max)], axis=-1)


def check_workspace() -> Outcome:
    """The paper's example, and every sequence of up to N_max tokens for other N_max."""
    task, holds = Task(M=5, G=12, N_max=4), True
    example = [np.asarray(build(task, WORKED_EXAMPLE))[0] for build in (cpm3.workspace_by_mha, cpm3.workspace_by_iha)]
    rows = [[1, 2, 3, 4], [2, 3, 4, 1], [3, 4, 1, 2], [4, 1, 2, 3]]
    holds &= all(np.array_equal(rows, found) for found in example)
    for N_max in N_MAX:
        task = Task(M=3, G=8, N_max=N_max)
        sequences = all_sequences(task)
        for build in (cpm3.workspace_by_mha, cpm3.workspace_by_iha):
            holds &= np.array_equal(build(task, sequences), cyclic_shifts(task, sequences))
    shown = ", ".join("".join(f"{token:.0f}" for token in row) for row in example[1])
    return Outcome(bool(holds), f"(1, 2, 3, 4): rows {shown}; all sequences of up to N_max tokens, N_max in {N_MAX}")


def check_counts() -> Outcome:
    """Equal to brute force for all sequences of up to N_max tokens, and every order-sensitive G modulo M."""
    compared, holds, sizes = 0, True, ((3, 6), (4, 5), (5, 4))
    for M, N_max in sizes:
        for G in (G for G in range(2 * M + 1, 3 * M + 1) if cpm3.is_order_sensitive(G, M)):
            task = Task(M, G, N_max)
            sequences = all_sequences(task)
            for build in (cpm3.counts_by_mha, cpm3.counts_by_iha):
                holds &= np.array_equal(build(task, sequences), cpm3.brute_force(task, sequences))
            compared += len(sequences)
    return Outcome(bool(holds), f"all {compared} sequences of up to N_max tokens, M, N_max = {sizes}: no count differs")


def softened(workspace: np.ndarray, inverse_temperature: float) -> np.ndarray:
    """What softmax makes of it: `(e^b - 1) / (e^b + N - 1)` of the match, and `1 / (e^b + N - 1)` of each token."""
    N = workspace.shape[-1]
    rest = 1 / (math.expm1(inverse_temperature) + N)
    return (1 - N * rest) * workspace + rest * workspace.sum(-1, keepdims=True)


def check_temperature() -> Outcome:
    """Softmax at factor b has the closed form above, for MHA and IHA alike, and tends to the exact counts."""
    task, b_values = Task(M=4, G=10, N_max=5), (1.0, 10.0, 30.0)
    sequences = all_sequences(task)[::7]
    expected, counts = cyclic_shifts(task, sequences), cpm3.brute_force(task, sequences)
    worst, errors = 0.0, []
    for b in b_values:
        attend = cold_softmax_attention(b)
        soft = [build(task, sequences, attend) for build in (cpm3.workspace_by_mha, cpm3.workspace_by_iha)]
        worst = max(worst, *(float(np.abs(found - softened(expected, b)).max()) for found in soft))
        errors.append(float(np.abs(cpm3.counts_by_iha(task, sequences, attend) - counts).max()))
    weights, mixing = cpm3.iha_construction(task.N_max)
    q, k, v = project(cpm3.with_positions(task, sequences), weights)
    public = interleaved_head_attention(
        cold_queries(q, b_values[-1]), k, v, *map(jnp.asarray, mixing), causal=False
    ).reshape(*soft[1].shape[:2], -1)[..., : task.N_max]
    worst = max(worst, float(np.abs(np.asarray(public) - softened(expected, b_values[-1])).max()))
    falling = all(later < earlier for earlier, later in itertools.pairwise(errors))
    shown = ", ".join(f"{error:.0e} at {b:.0f}" for b, error in zip(b_values, errors, strict=True))
    return Outcome(
        worst <= TOLERANCE and falling and errors[-1] < 1e-6,
        f"off the closed form by {worst:.1e}; counts off by {shown}",
    )


def check_order() -> Outcome:
    """The condition against its meaning, for all M up to 12 and G modulo M."""
    checked, holds, wide = 0, True, 0
    for M, g in [(modulus, residue) for modulus in range(1, 13) for residue in range(modulus)]:
        a, b, c = np.meshgrid(*[np.arange(M)] * 3, indexing="ij")
        one, other = (c + g * a + b) % M == 0, (c + g * b + a) % M == 0
        ordered = not (one & other & (a != b)).any()
        first_counts = bool((one != one[:1]).any())
        G = g + 3 * M
        holds &= cpm3.is_order_sensitive(G, M) == (ordered and first_counts)
        wide += not cpm3.is_order_sensitive(G, M)
        checked += 1
    evidence = f"{checked} pairs of M and G, all with G > 2M, of which {wide} are not order-sensitive"
    return Outcome(bool(holds) and wide > 0, evidence)


def check_appendix_example() -> Outcome:
    """(1, 2, 3) with G = 10 counts 3 everywhere for one M alone, where G = 1: the order of a pair does not matter."""
    moduli = []
    for M in range(1, 100):
        i, j1, j2 = APPENDIX_EXAMPLE[:, None, None], APPENDIX_EXAMPLE[:, None], APPENDIX_EXAMPLE
        if (((i + 10 * j1 + j2) % M == 0).sum((1, 2)) == 3).all():
            moduli.append(M)
    try:
        refused = bool(Task(M=3, G=10, N_max=3)) is False
    except cpm3.CPM3Error:
        refused = True
    task = Task(M=3, G=10, N_max=3, require_order_sensitive=False)
    sequence = APPENDIX_EXAMPLE[None] % 3
    counts = [build(task, sequence) for build in (cpm3.brute_force, cpm3.counts_by_mha, cpm3.counts_by_iha)]
    holds = moduli == [3] and refused and all((found == 3).all() for found in counts)
    return Outcome(bool(holds), f"counts 3 for M in {moduli} of 1..99, where G mod M = {10 % 3}; refused by default")


def check_parameters() -> Outcome:
    """The closed forms against the arrays, attention and MLP."""
    holds, sizes = True, range(1, 18)
    for N in sizes:
        mha, (iha, mixing) = cpm3.mha_construction(N), cpm3.iha_construction(N)
        holds &= count_parameters(mha) == cpm3.mha_parameters(N) and len(mha.query) == N
        holds &= count_parameters(iha, mixing) == cpm3.iha_parameters(N)
        holds &= len(iha.query) == mixing.alpha_q.shape[2] == math.ceil(math.sqrt(N))
    for M, G, N_max in ((3, 8, 5), (5, 12, 4), (4, 10, 3)):
        task = Task(M, G, N_max)
        holds &= count_parameters(cpm3.counting_mlp(task)) == cpm3.mlp_parameters(task)
    larger = [N for N in range(1, 1000) if cpm3.iha_parameters(N) >= cpm3.mha_parameters(N)]
    holds &= larger == [1, 2, 3, 5]
    return Outcome(
        bool(holds), f"N_max = 1 to {sizes[-1]}; up to 999 IHA's attention is smaller but for N_max in {larger}"
    )


def check_gain_is_in_attention() -> Outcome:
    """Attention grows with exponent 2.5 against 3, totals with 3 both; the ratio of totals is bounded."""
    sizes = [2**power for power in (10, 12, 14, 16)]
    tasks = [Task(M=5, G=12, N_max=N) for N in sizes]
    mlp = [cpm3.mlp_parameters(task) for task in tasks]
    mha, iha = [cpm3.mha_parameters(N) for N in sizes], [cpm3.iha_parameters(N) for N in sizes]
    totals = [[a + b for a, b in zip(attention, mlp, strict=True)] for attention in (mha, iha)]
    slopes = [float(np.polyfit(np.log(sizes), np.log(np.array(y, float)), 1)[0]) for y in (mha, iha, *totals)]
    ratios = [first / second for first, second in zip(mha, iha, strict=True)]
    total, bound = totals[0][-1] / totals[1][-1], 1 + 2 / (3 * cpm3.hats(tasks[-1]))
    holds = np.allclose(slopes, [3, 2.5, 3, 3], atol=0.02) and ratios[-1] > 2 * ratios[0] and total < bound
    return Outcome(
        bool(holds),
        f"exponents {slopes[0]:.2f} (MHA), {slopes[1]:.2f} (IHA), with the MLP {slopes[2]:.2f}, {slopes[3]:.2f}; "
        f"MHA over IHA at N_max = {sizes[-1]}: attention {ratios[-1]:.0f}, total {total:.3f} (< {bound:.3f} for M = 5)",
    )


STATEMENTS = (
    Statement("CPM-3: N_max heads of MHA and ceil(sqrt(N_max)) of IHA write all cyclic shifts", check_workspace),
    Statement("CPM-3: with the counting MLP both equal brute force", check_counts),
    Statement("CPM-3: softmax tends to hard attention as the temperature falls", check_temperature),
    Statement("CPM-3: the condition for sensitivity to order is exact, and G > 2M is not it", check_order),
    Statement("CPM-3: the appendix's example is not order-sensitive", check_appendix_example),
    Statement("CPM-3: closed forms for heads and parameters equal the arrays", check_parameters),
    Statement("CPM-3: the gain is in the attention alone", check_gain_is_in_attention),
)
