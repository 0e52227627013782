"""Learning curves: validation accuracy against epochs, one panel a learning rate."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from iha_jax.comparison.figure import COLORS


def draw(results: Sequence[dict[str, Any]], path: epath.Path) -> None:
    """A line is the mean over seeds, a band their range; a seed that has stopped counts with its last value."""
    rates = sorted({result["learning_rate"] for result in results}, reverse=True)
    arms = list(dict.fromkeys(result["arm"] for result in results))
    colors = dict(zip(arms, itertools.cycle(COLORS), strict=False))
    styles = {arm: "-" if i < len(COLORS) else "--" for i, arm in enumerate(arms)}
    figure = Figure(figsize=(6.5 * len(rates), 4.6), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    for panel, rate in zip(panels, rates, strict=True):
        for result in (r for r in results if r["learning_rate"] == rate):
            arm, curves = result["arm"], 100 * last_carried_on(result["history"]["validation_accuracy"])
            epochs = 1 + np.arange(curves.shape[1])
            label = f"{arm} (n={len(curves)})"
            panel.plot(epochs, curves.mean(0), color=colors[arm], ls=styles[arm], lw=1.8, label=label)
            panel.fill_between(epochs, curves.min(0), curves.max(0), color=colors[arm], alpha=0.2, lw=0)
        panel.set_title(f"learning rate {rate:g}", fontsize=10)
        panel.set_xlabel("epochs")
        panel.grid(alpha=0.3)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0].set_ylabel("validation entries right (%)")
    panels[-1].legend(frameon=False)
    figure.suptitle("Mean over seeds, band: lowest to highest; stopped seeds keep their last value", fontsize=10)
    with path.open("wb") as file:
        figure.savefig(file, format="png")


def last_carried_on(curves: Sequence[Sequence[float]]) -> np.ndarray:
    """[seeds, epochs]: curves of different lengths, each continued with its last value."""
    longest = max(map(len, curves))
    return np.array([[*curve, *[curve[-1]] * (longest - len(curve))] for curve in curves])
