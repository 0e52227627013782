"""The pictures: validation loss against tokens, FLOPs and wall-clock; differences with their intervals."""

import itertools
from collections.abc import Sequence

import numpy as np
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from iha_jax.comparison.table import Row

# Okabe-Ito: distinguishable with any color vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")
AXES = (
    ("tokens", 1e6, "training tokens (millions)"),
    ("flops", 1e12, "useful training FLOPs (10¹²)"),
    ("seconds", 60, "training time (minutes)"),
)


def draw(rows: Sequence[Row], path: epath.Path, *, dpi: int = 120) -> None:
    """Three panels, 13.5 by 4.4 inches; a line is the mean over seeds, a band their range."""
    figure = Figure(figsize=(13.5, 4.4), dpi=dpi, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    shown: list[float] = []
    for number, (row, color) in enumerate(zip(rows, itertools.cycle(COLORS), strict=False)):
        style = STYLES[number // len(COLORS) % len(STYLES)]
        steps = sorted(set.intersection(*({v["step"] for v in r.val} for r in row.results)))
        losses = _curves(row, "loss", steps)
        # The first evaluation, of the untrained model, would flatten everything after it.
        shown += [loss for loss in losses[:, [step > 0 for step in steps]].flat if np.isfinite(loss)]
        for panel, (name, unit, _) in zip(panels, AXES, strict=True):
            x = _curves(row, name, steps).mean(0) / unit
            panel.plot(x, losses.mean(0), color=color, ls=style, lw=1.8, label=f"{row.label} (n={len(row.results)})")
            panel.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.2, lw=0)
    low, high = min(shown), max(shown)
    panels[0].set_ylim(low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01)
    panels[0].set_ylabel("validation loss (nats per token)")
    for panel, (_, _, label) in zip(panels, AXES, strict=True):
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[-1].legend(frameon=False, fontsize="small" if len(rows) > len(COLORS) else None)
    figure.suptitle("Validation loss: mean over seeds, band: lowest to highest seed", fontsize=10)
    with path.open("wb") as file:
        figure.savefig(file, format="png")


def draw_differences(rows: Sequence[Row], path: epath.Path) -> None:
    """A line a row that has a difference: its mean and its interval, in color where the interval leaves out 0."""
    figure = Figure(figsize=(8.5, 1.1 + 0.28 * len(rows)), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for place, row in enumerate(rows):
        difference = row.difference
        if difference is None:
            continue
        color = COLORS[2 if difference.mean < 0 else 1] if difference.distinguishable else "#777777"
        panel.errorbar(difference.mean, place, xerr=difference.half_width or 0.0, color=color, marker="o", capsize=3)
    panel.axvline(0, color="black", lw=0.8)
    panel.set_yticks(range(len(rows)), [row.label for row in rows])
    panel.invert_yaxis()
    panel.grid(alpha=0.3, axis="x")
    baselines = dict.fromkeys(row.baseline for row in rows)
    compared = next(iter(baselines)) if len(baselines) == 1 else "the first arm at the same setting"
    panel.set_xlabel(f"bits per byte less those of {compared} (below 0: better)")
    figure.suptitle("Mean over seeds, paired, and its 95 % interval; gray: not distinguishable", fontsize=10)
    with path.open("wb") as file:
        figure.savefig(file, format="png")


def _curves(row: Row, name: str, steps: Sequence[int]) -> np.ndarray:
    """[seeds, steps]: a column of the validation rows that all seeds have; a loss that was no number is NaN."""
    wanted = set(steps)
    return np.array([[v[name] for v in r.val if v["step"] in wanted] for r in row.results], dtype=float)
