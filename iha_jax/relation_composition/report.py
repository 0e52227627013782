"""The results of one experiment as a table, differences and a verdict on the paper's order."""

import csv
import io
import itertools
from collections.abc import Sequence
from typing import Any

from etils import epath

from iha_jax.comparison.statistics import Estimate, estimate, paired_difference
from iha_jax.relation_composition.experiment import Point
from iha_jax.relation_composition.figure import draw
from iha_jax.relation_composition.runs import RESULT, read_results
from iha_jax.relation_composition.training import Trainable

Result = dict[str, Any]
METRICS = {"test_accuracy": "entries right", "test_exact": "matrices right"}
COLUMNS = ("arm", "learning_rate", "parameters", "seed", "epochs", "best_validation_loss", "test_loss", *METRICS)
HEADER = ("arm", "learning rate", "parameters", *(f"{m}, %" for m in METRICS.values()), "epochs", "seconds")
CLAIMED = ("iha", "simplicial", "mha")  # the paper's order, best first
NOTES = (
    "Shares of the test set in percent, at the parameters with the lowest validation loss; ± is the half-width of a "
    "95 % Student-t interval over n seeds (initial weights and order of examples; the examples are the same). Seconds "
    "are for all seeds together, compilation included. Differences are paired by seed, in percentage points; intervals "
    "are not corrected for how many there are."
)


def report(folder: epath.Path, name: str, points: Sequence[Point]) -> str:
    """Writes `report.md`, `report.csv` and `report.png` of the finished points into `folder`, and returns the text.

    Raises:
      ValueError: when no point is finished.
    """
    results = finished(folder, points)
    experiment, first = points[0].experiment, results[0]
    title = f"# Relation composition: {name}"
    data = (
        f"{experiment.hops} hops, sizes {experiment.smallest_size} to {experiment.largest_size}, density "
        f"{experiment.density:g}; {experiment.train_examples} / {experiment.validation_examples} / "
        f"{experiment.test_examples} examples, none in two splits. Always answering with the commoner label is right "
        f"for {100 * max(first['ones'], 1 - first['ones']):.2f} % of the entries. Device: "
        f"{', '.join(dict.fromkeys(result['device'] for result in results))}."
    )
    sections = [title, "![learning curves](report.png)", data, table(results)]
    sections += ["\n".join(f"- {line}" for line in [*differences(results, experiment.arms[0]), *verdicts(results)])]
    draw(results, folder / "report.png")
    return written(folder, points, [*(section for section in sections if section), NOTES], csv_text(results))


def finished(folder: epath.Path, points: Sequence[Trainable]) -> list[Result]:
    """The results there are. Raises ValueError when there is none."""
    results = read_results(folder, points)
    if not results:
        raise ValueError(f"{folder}: no finished point to report")
    return results


def written(folder: epath.Path, points: Sequence[Trainable], sections: Sequence[str], lines: str) -> str:
    """Writes `report.md` of `sections`, the last of which are notes, and `report.csv` of `lines`. Returns the text."""
    missing = [point.folder for point in points if not (folder / point.folder / RESULT).exists()]
    left_out = [f"Not finished, and left out: {', '.join(missing)}."] if missing else []
    text = "\n\n".join([*sections[:-1], *left_out, sections[-1]]) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.csv").write_text(lines, encoding="utf-8")
    return text + f"\nwrote {folder}/report.md, .csv and .png"


def by_seed(result: Result, metric: str = "test_accuracy") -> dict[int, float]:
    """Seed -> percent."""
    return {seed: 100 * value for seed, value in zip(result["seeds"], result[metric], strict=True)}


def table(results: Sequence[Result]) -> str:
    """Markdown, a row a point, best accuracy first within a learning rate."""
    lines = [HEADER, ("---",) * len(HEADER)]
    for result in sorted(results, key=lambda r: (-r["learning_rate"], -sum(r["test_accuracy"]))):
        metrics = (estimate(list(by_seed(result, metric).values())).text(2) for metric in METRICS)
        epochs = f"{min(result['epochs'])} to {max(result['epochs'])}"
        known = (result["arm"], f"{result['learning_rate']:g}", f"{result['parameters']:,}".replace(",", " "))
        lines.append((*known, *metrics, epochs, f"{result['seconds']:.0f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def best_of(results: Sequence[Result]) -> dict[str, Result]:
    """Each arm at its learning rate with the lowest mean validation loss."""
    ordered = sorted(results, key=lambda r: sum(r["best_validation_loss"]) / len(r["best_validation_loss"]))
    return {result["arm"]: result for result in reversed(ordered)}


def differences(results: Sequence[Result], first: str) -> list[str]:
    """Every arm less arm `first` in entries right, each at its best learning rate by validation loss."""
    best = best_of(results)
    if first not in best:
        return []
    return [
        f"{_at(result)} less {_at(best[first])}: {_difference(result, best[first]).text(2)} points"
        for result in sorted(best.values(), key=lambda r: r["arm"])
        if result["arm"] != first
    ]


def verdicts(results: Sequence[Result]) -> list[str]:
    """Whether `IHA > 2-simplicial > MHA` holds in entries right, for every IHA arm, by the intervals of the paired
    differences of neighbors: it does when both lie above 0, and does not when one lies below 0."""
    best = best_of(results)
    return [
        verdict(best, (arm, *CLAIMED[1:]))
        for arm in best
        if arm.startswith(CLAIMED[0]) and all(other in best for other in CLAIMED[1:])
    ]


def verdict(best: dict[str, Result], order: Sequence[str]) -> str:
    pairs = [(high, low, _difference(best[high], best[low])) for high, low in itertools.pairwise(order)]
    steps = "; ".join(f"{high} less {low} {difference.text(2)}" for high, low, difference in pairs)
    if any(difference.half_width is None for *_, difference in pairs):
        outcome = "cannot be judged from one seed"
    elif all(difference.distinguishable and difference.mean > 0 for *_, difference in pairs):
        outcome = "holds"
    elif any(difference.distinguishable and difference.mean < 0 for *_, difference in pairs):
        outcome = "does not hold"
    else:
        outcome = "is not decided by these seeds"
    return f"The order {' > '.join(order)} {outcome} ({steps} points, each at its best learning rate)."


def csv_text(results: Sequence[Result]) -> str:
    """A line a seed."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for result in results:
        for s, seed in enumerate(result["seeds"]):
            of_seed = [result[name][s] for name in COLUMNS[4:]]
            writer.writerow([*(result[name] for name in COLUMNS[:3]), seed, *of_seed])
    return out.getvalue()


def _difference(result: Result, other: Result) -> Estimate:
    found = paired_difference(by_seed(result), by_seed(other))
    assert found is not None, "points of one experiment have the same seeds"
    return found


def _at(result: Result) -> str:
    return f"{result['arm']} ({result['learning_rate']:g})"
