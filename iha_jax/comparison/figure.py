"""The picture: validation loss against tokens, FLOPs and wall-clock."""

import itertools
from collections.abc import Sequence

import numpy as np
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from iha_jax.comparison.table import Row

# Okabe-Ito: distinguishable with any color vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
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
    for row, color in zip(rows, itertools.cycle(COLORS), strict=False):
        steps = sorted(set.intersection(*({v["step"] for v in r.val} for r in row.results)))
        losses = _curves(row, "loss", steps)
        # The first evaluation, of the untrained model, would flatten everything after it.
        shown += [loss for loss in losses[:, [step > 0 for step in steps]].flat if np.isfinite(loss)]
        for panel, (name, unit, _) in zip(panels, AXES, strict=True):
            x = _curves(row, name, steps).mean(0) / unit
            panel.plot(x, losses.mean(0), color=color, lw=1.8, label=f"{row.label} (n={len(row.results)})")
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
    panels[-1].legend(frameon=False)
    figure.suptitle("Validation loss: mean over seeds, band: lowest to highest seed", fontsize=10)
    with path.open("wb") as file:
        figure.savefig(file, format="png")


def _curves(row: Row, name: str, steps: Sequence[int]) -> np.ndarray:
    """[seeds, steps]: a column of the validation rows that all seeds have; a loss that was no number is NaN."""
    wanted = set(steps)
    return np.array([[v[name] for v in r.val if v["step"] in wanted] for r in row.results], dtype=float)
