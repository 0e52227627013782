"""The picture: validation loss against tokens, FLOPs and wall-clock."""

import os
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


def draw(rows: Sequence[Row], path: epath.Path) -> None:
    """Three panels; a line is the mean over seeds, a band their range."""
    figure = Figure(figsize=(13.5, 4.2), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    for row, color in zip(rows, COLORS * (1 + len(rows) // len(COLORS)), strict=False):
        steps = sorted(set.intersection(*({v["step"] for v in r.val} for r in row.results)))
        losses = np.array([[v["loss"] for v in r.val if v["step"] in steps] for r in row.results])
        for panel, (name, unit, _) in zip(panels, AXES, strict=True):
            x = np.mean([[v[name] for v in r.val if v["step"] in steps] for r in row.results], axis=0) / unit
            panel.plot(x, losses.mean(0), color=color, lw=1.8, label=f"{row.label} (n={len(row.results)})")
            panel.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.2, lw=0)
    # The first evaluation, of the untrained model, would flatten everything after it.
    later = [v["loss"] for row in rows for r in row.results for v in r.val if v["step"] > 0]
    low, high = min(later), max(later)
    panels[0].set_ylim(low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01)
    panels[0].set_ylabel("validation loss (nats per token)")
    for panel, (_, _, label) in zip(panels, AXES, strict=True):
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[-1].legend(frameon=False)
    figure.savefig(os.fspath(path), format="png")
