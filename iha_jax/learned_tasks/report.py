"""Accuracy against the number of heads, as a table, a picture and a verdict on the theorem's head counts."""

import csv
import io
import itertools
from collections.abc import Sequence
from typing import Any

from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from iha_jax.comparison.figure import COLORS
from iha_jax.comparison.statistics import Estimate, estimate, paired_difference
from iha_jax.learned_tasks.experiment import IHA, MATCHED, MHA, ExperimentConfig, Point
from iha_jax.relation_composition.report import by_seed, finished, written

Result = dict[str, Any]
SOLVED = 95.0  # percent of the test entries
KNOWN = ("mechanism", "heads", "value_width", "attention_parameters", "parameters", "learning_rate")
OF_SEEDS = ("epochs", "best_validation_loss", "test_loss", "test_accuracy", "test_exact")
HEADER = (
    *("mechanism", "heads", "value width", "attention parameters", "all parameters", "learning rate"),
    *("right, %", "wholly right, %", "R²", "epochs", "seconds"),
)
NOTES = (
    "Shares of the test set at the parameters with the lowest validation loss; ± is the half-width of a 95 % Student-t "
    "interval over n seeds (initial weights and order of examples; the examples are the same). Wholly right: examples "
    "with every entry right. R² is 1 less the squared error over its variance, averaged over entries. Seconds are for "
    "all seeds together, compilation included. mha_matched: values so wide that attention has IHA's parameters."
)


def report(folder: epath.Path, name: str, points: Sequence[Point]) -> str:
    """Writes `report.md`, `report.csv` and `report.png` of the finished points into `folder`, and returns the text.

    Raises:
      ValueError: when no point is finished.
    """
    results = finished(folder, points)
    experiment, best = points[0].experiment, best_rates(results)
    data = f"{experiment.describe()} Device: {', '.join(dict.fromkeys(result['device'] for result in results))}."
    if experiment.counts:
        data += f" Always giving the commonest label is right for {100 * best[0]['commonest']:.1f} % of the entries."
    needed = experiment.heads_by_theorem()
    sections = [f"# Learned tasks: {name}", "![accuracy against heads](report.png)", data, table(best)]
    sections += ["\n".join(f"- {line}" for line in [verdict(best, needed), *differences(best, needed)])]
    draw(best, experiment, name, folder / "report.png")
    return written(folder, points, [*sections, NOTES], csv_text(results))


def best_rates(results: Sequence[Result]) -> list[Result]:
    """Every mechanism and number of heads at its learning rate with the lowest mean validation loss, in their order."""
    found: dict[tuple[str, int], Result] = {}
    for result in results:
        key = result["mechanism"], result["heads"]
        if key not in found or _mean(result) < _mean(found[key]):
            found[key] = result
    return list(found.values())


def percent(result: Result, metric: str = "test_accuracy") -> Estimate:
    return estimate(list(by_seed(result, metric).values()))


def table(results: Sequence[Result]) -> str:
    """Markdown, a row a mechanism and number of heads."""
    lines = [HEADER, ("---",) * len(HEADER)]
    for result in results:
        counts = (f"{result[name]:,}".replace(",", " ") for name in KNOWN[1:5])
        r_squared = estimate([1 - loss for loss in result["test_loss"]]).text(3)
        metrics = (percent(result).text(1), percent(result, "test_exact").text(1), r_squared)
        epochs = f"{min(result['epochs'])} to {max(result['epochs'])}"
        known = (result["mechanism"], *counts, f"{result['learning_rate']:g}")
        lines.append((*known, *metrics, epochs, f"{result['seconds']:.0f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def state(result: Result) -> bool | None:
    """Whether the task is solved: the interval of accuracy lies above `SOLVED` percent, or below; else None."""
    found = percent(result)
    if found.half_width is None:
        return None
    if found.mean - found.half_width >= SOLVED:
        return True
    return False if found.mean + found.half_width < SOLVED else None


def verdict(results: Sequence[Result], needed: dict[str, int]) -> str:
    """Whether IHA solves the task with its construction's heads, and MHA with those of its own but not with fewer."""
    states = {(result["mechanism"], result["heads"]): state(result) for result in results}
    iha, mha = states.get((IHA, needed[IHA])), states.get((MHA, needed[MHA]))
    fewer = [states[mechanism, H] for mechanism, H in states if mechanism == MHA and H in range(needed[MHA])]
    if iha and mha and fewer and all(solved is False for solved in fewer):
        outcome = "holds"
    elif iha is False or mha is False or True in fewer:
        outcome = "does not hold"
    else:
        outcome = "is not decided by these seeds"
    tried = dict.fromkeys(mechanism for mechanism, H in states if H)
    first = "; ".join(f"{mechanism} {_first_solved(states, mechanism)}" for mechanism in tried)
    return (
        f"That learning needs the theorem's heads ({needed[MHA]} of MHA, {needed[IHA]} of IHA) {outcome}. Solved, "
        f"that is the interval above {SOLVED:g} %: {first}."
    )


def differences(results: Sequence[Result], needed: dict[str, int]) -> list[str]:
    """IHA with its theorem's heads less the others with as many, and less MHA with MHA's."""
    found = {(result["mechanism"], result["heads"]): result for result in results}
    mine = found.get((IHA, needed[IHA]))
    pairs = [(MHA, needed[IHA]), (MATCHED, needed[IHA]), (MHA, needed[MHA])]
    lines = []
    for other in dict.fromkeys(pairs):
        if mine and other in found:
            difference = paired_difference(by_seed(mine), by_seed(found[other]))
            assert difference is not None, "points of one experiment have the same seeds"
            names = f"{IHA} with {needed[IHA]} heads less {other[0]} with {other[1]}"
            lines.append(f"{names}: {difference.text(1)} points, paired by seed.")
    return lines


def csv_text(results: Sequence[Result]) -> str:
    """A line a seed."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*KNOWN, "seed", *OF_SEEDS])
    for result in results:
        for s, seed in enumerate(result["seeds"]):
            writer.writerow([*(result[name] for name in KNOWN), seed, *(result[name][s] for name in OF_SEEDS)])
    return out.getvalue()


def draw(results: Sequence[Result], experiment: ExperimentConfig, name: str, path: epath.Path) -> None:
    """Heads on x, accuracy on y, a line a mechanism; the theorem's heads are marked, what has none is a level."""
    needed = experiment.heads_by_theorem()
    figure = Figure(figsize=(8.5, 4.6), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    mechanisms = list(dict.fromkeys(result["mechanism"] for result in results))
    for mechanism, color in zip(mechanisms, itertools.cycle(COLORS), strict=False):
        rows = sorted((r for r in results if r["mechanism"] == mechanism), key=lambda r: r["heads"])
        found = [percent(row) for row in rows]
        label = f"{mechanism} (n={found[0].n})"
        if not rows[0]["heads"]:
            panel.axhline(found[0].mean, color=color, ls="--", lw=1.2, label=label)
            continue
        beside = 0.06 * (mechanisms.index(mechanism) - 1)  # bars of equal heads side by side
        heads, means = [row["heads"] + beside for row in rows], [one.mean for one in found]
        half_widths = [one.half_width or 0.0 for one in found]
        for x, row in zip(heads, rows, strict=True):
            panel.plot([x] * len(row["seeds"]), list(by_seed(row).values()), ".", color=color, ms=5, alpha=0.5)
        panel.errorbar(heads, means, half_widths, color=color, marker="o", ms=4, lw=1.8, capsize=3, label=label)
        if mechanism in needed:
            text = f"theorem: {needed[mechanism]} heads of {mechanism}"
            panel.axvline(needed[mechanism], color=color, ls=":", lw=1.5, label=text)
    if experiment.counts:
        panel.axhline(100 * results[0]["commonest"], color="grey", ls="-.", lw=1, label="commonest label")
    panel.set(xlabel="heads", ylabel="test entries right (%)", ylim=(-3, 108))
    panel.set_title(f"{name}: mean over seeds, bars: 95 % intervals, dots: seeds", fontsize=10)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    with path.open("wb") as file:
        figure.savefig(file, format="png")


def _mean(result: Result) -> float:
    return sum(result["best_validation_loss"]) / len(result["best_validation_loss"])


def _first_solved(states: dict[tuple[str, int], bool | None], mechanism: str) -> str:
    heads = [H for (kind, H), solved in states.items() if kind == mechanism and solved]
    tried = [H for kind, H in states if kind == mechanism]
    listed = ", ".join(map(str, sorted(tried)))
    return f"with {min(heads)} heads" if heads else f"with none of {listed} heads"
