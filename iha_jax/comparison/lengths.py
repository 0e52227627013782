"""Accuracy against the length of the text, of runs whose validation rows have it (generated retrieval)."""

import re
from collections.abc import Sequence

from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from iha_jax.comparison.figure import COLORS
from iha_jax.comparison.statistics import Estimate, estimate, paired_difference
from iha_jax.comparison.table import Row
from iha_jax.evaluation.retrieval import KEYS, metric_name

TITLE = "Right answers by length of the text"
NOTES = (
    "Shares of values answered right, after the last step; trained: keys that training texts ask for, held_out: keys "
    "that they have and never ask for; ± is the half-width of a 95 % Student-t interval over n seeds, differences are "
    "paired by seed. Lengths above the training context were never trained."
)
_NAME = re.compile(metric_name(f"({'|'.join(KEYS)})", 0).replace("_0", r"_(\d+)"))


def measured(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """(keys, length) of every accuracy that the last validation rows of all runs have, in order."""
    names = set.intersection(*(set(result.final) for row in rows for result in row.results))
    found = [(match[1], int(match[2])) for match in map(_NAME.fullmatch, names) if match]
    return sorted(found, key=lambda place: (KEYS.index(place[0]), place[1]))


def accuracies(row: Row, keys: str, length: int) -> dict[int, float]:
    """Share of right answers by seed."""
    return {result.run.seed: result.final[metric_name(keys, length)] for result in row.results}


def length_table(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines: a line a kind of keys and length, a column an arm, then each arm against the first."""
    first, others = rows[0], rows[1:]
    lines = [["keys", "tokens", *(row.label for row in rows), *(f"{row.label} - {first.label}" for row in others)]]
    for keys, length in measured(rows):
        values = [accuracies(row, keys, length) for row in rows]
        means: list[Estimate | None] = [estimate(list(seeds.values())) for seeds in values]
        differences = [paired_difference(seeds, values[0]) for seeds in values[1:]]
        cells = [found.text(3) if found else "-" for found in means + differences]
        lines.append([keys, str(length), *cells])
    return lines


def draw_lengths(rows: Sequence[Row], path: epath.Path) -> None:
    """A panel a kind of keys: mean accuracy of every arm against length, with its interval; trained lengths shaded."""
    figure = Figure(figsize=(9.5, 4.2), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    places = measured(rows)
    panels = figure.subplots(1, len(KEYS), sharey=True)
    context = rows[0].results[0].config.model.context_length
    for panel, keys in zip(panels, KEYS, strict=True):
        lengths = [length for kind, length in places if kind == keys]
        for number, row in enumerate(rows):
            found = [estimate(list(accuracies(row, keys, length).values())) for length in lengths]
            panel.errorbar(
                [length * 1.03 ** (number - len(rows) / 2) for length in lengths],  # side by side, not over one another
                [one.mean for one in found],
                yerr=[one.half_width or 0.0 for one in found],
                color=COLORS[number % len(COLORS)],
                label=f"{row.label} (n={len(row.results)})",
                marker="o",
                capsize=3,
            )
        panel.axvspan(lengths[0] / 1.2, context * 1.1, color="black", alpha=0.06, lw=0)
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [str(length) for length in lengths])
        panel.set_title(f"{keys.replace('_', ' ')} keys", fontsize=10)
        panel.set_xlabel("tokens of the text (shaded: lengths of training)")
        panel.set_ylim(-0.02, 1.02)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of right answers")
    panels[-1].legend(frameon=False)
    figure.suptitle("Multi-key retrieval: mean over seeds and its 95 % interval", fontsize=10)
    with path.open("wb") as file:
        figure.savefig(file, format="png")
