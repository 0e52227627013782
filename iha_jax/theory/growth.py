"""Heads and parameters of the constructions against k and N_max: the table and the picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from iha_jax.theory import cpm3, polynomial_filters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS, WIDTH = 1024, 1  # N and r of the filters; independent powers need k <= N
MODULUS, FACTOR = 5, 12
COUNTS = (1, 2, 3, 4, 9, 10, 16, 64, 100, 256, 1024)
FITTED = (16, 64, 256, 1024)  # perfect squares: without the steps of ceil


class Growth(NamedTuple):
    """One task at one size; `size` is k or N_max, parameters those of the attention, `mlp` what both add to them."""

    size: int
    mha_heads: int
    iha_heads: int
    mha_parameters: int
    iha_parameters: int
    mlp: int = 0


def filter_growth(sizes: Sequence[int] = COUNTS) -> list[Growth]:
    """Polynomial filters against k."""
    return [
        Growth(
            k,
            k,
            polynomial_filters.iha_heads(k),
            polynomial_filters.mha_parameters(TOKENS, WIDTH, k),
            polynomial_filters.iha_parameters(TOKENS, WIDTH, k),
        )
        for k in sizes
    ]


def cpm3_growth(sizes: Sequence[int] = COUNTS) -> list[Growth]:
    """CPM-3 against N_max."""
    return [
        Growth(
            N,
            N,
            cpm3.iha_heads(N),
            cpm3.mha_parameters(N),
            cpm3.iha_parameters(N),
            cpm3.mlp_parameters(cpm3.Task(MODULUS, FACTOR, N)),
        )
        for N in sizes
    ]


def exponent(rows: Sequence[Growth], name: str, *, with_mlp: bool = False) -> float:
    """Slope of `log name` against `log size`, fitted to the sizes in FITTED."""
    fitted = [row for row in rows if row.size in FITTED]
    y = [float(getattr(row, name) + (row.mlp if with_mlp else 0)) for row in fitted]
    return float(np.polyfit(np.log([row.size for row in fitted]), np.log(y), 1)[0])


def table() -> str:
    """Both tasks as text, with the fitted exponents."""
    filters, counts = filter_growth(), cpm3_growth()
    lines = [
        f"polynomial filters, N = {TOKENS}, r = {WIDTH}: attention parameters",
        f"{'k':>6} {'heads MHA':>10} {'IHA':>5} {'parameters MHA':>17} {'IHA':>14} {'MHA/IHA':>8}",
        *(_line(row) for row in filters),
        _slopes("k", filters),
        "",
        f"CPM-3, M = {MODULUS}, G = {FACTOR}: attention parameters; total ones with the counting MLP",
        f"{'N_max':>6} {'heads MHA':>10} {'IHA':>5} {'parameters MHA':>17} {'IHA':>14} {'MHA/IHA':>8} "
        f"{'total MHA':>17} {'IHA':>17} {'MHA/IHA':>8}",
        *(_line(row) + _total(row) for row in counts),
        _slopes("N_max", counts)
        + f"; totals {exponent(counts, 'mha_parameters', with_mlp=True):.2f} (MHA),"
        + f" {exponent(counts, 'iha_parameters', with_mlp=True):.2f} (IHA)",
    ]
    return "\n".join(lines)


def _line(row: Growth) -> str:
    return (
        f"{row.size:>6} {row.mha_heads:>10} {row.iha_heads:>5} {row.mha_parameters:>17,} {row.iha_parameters:>14,} "
        f"{row.mha_parameters / row.iha_parameters:>8.2f}"
    )


def _total(row: Growth) -> str:
    mha, iha = row.mha_parameters + row.mlp, row.iha_parameters + row.mlp
    return f" {mha:>17,} {iha:>17,} {mha / iha:>8.4f}"


def _slopes(size: str, rows: Sequence[Growth]) -> str:
    names = ("mha_heads", "iha_heads", "mha_parameters", "iha_parameters")
    found = [exponent(rows, name) for name in names]
    return (
        f"exponents in {size}, fitted to {', '.join(map(str, FITTED))}: "
        f"heads {found[0]:.2f} (MHA), {found[1]:.2f} (IHA); "
        f"attention parameters {found[2]:.2f} (MHA), {found[3]:.2f} (IHA)"
    )


def picture() -> "Figure":
    """Three log-log panels: heads, parameters of the filters, parameters of CPM-3; slopes in the legends."""
    # Only here: the statements and the table need no matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 3.9), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    filters, counts = filter_growth(), cpm3_growth()
    panels = figure.subplots(1, 3)
    lines = [
        (panels[0], filters, "heads", "heads (both tasks)", "k or N_max"),
        (panels[1], filters, "parameters", f"filters: attention parameters (N = {TOKENS}, r = {WIDTH})", "k"),
        (panels[2], counts, "parameters", "CPM-3: attention parameters", "N_max"),
    ]
    for panel, rows, quantity, title, size in lines:
        for kind, color in (("mha", "#0072B2"), ("iha", "#D55E00")):  # Okabe-Ito, as in the other pictures
            name = f"{kind}_{quantity}"
            label = f"{kind.upper()}: slope {exponent(rows, name):.2f}"
            panel.plot(
                [row.size for row in rows], [getattr(row, name) for row in rows], "o-", ms=3, color=color, label=label
            )
        panel.set(xscale="log", yscale="log", title=title, xlabel=size)
    for kind, color, style in (("mha", "#0072B2", "--"), ("iha", "#D55E00", ":")):
        totals = [getattr(row, f"{kind}_parameters") + row.mlp for row in counts]
        slope = exponent(counts, f"{kind}_parameters", with_mlp=True)
        label = f"{kind.upper()} with the MLP (M = {MODULUS}): slope {slope:.2f}"
        panels[2].plot([row.size for row in counts], totals, style, color=color, label=label)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
        panel.title.set_fontsize(10)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.suptitle(f"Closed forms; slopes fitted to {', '.join(map(str, FITTED))}", fontsize=9)
    return figure


def draw(path: Path) -> None:
    """`picture` as a PNG file."""
    figure = picture()
    with path.open("wb") as file:
        figure.savefig(file, format="png")
