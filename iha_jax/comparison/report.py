"""The report of a comparison, made from its run directories alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from etils import epath

from iha_jax.comparison import lengths, scaling, verdict
from iha_jax.comparison.arms import Comparison, longer_runs
from iha_jax.comparison.evaluations import NOTES as EVALUATION_NOTES
from iha_jax.comparison.evaluations import lines as evaluation_lines
from iha_jax.comparison.evaluations import read_evaluations
from iha_jax.comparison.figure import draw, draw_differences
from iha_jax.comparison.results import read_results
from iha_jax.comparison.runs import Run
from iha_jax.comparison.table import (
    Row,
    aligned,
    best_of,
    csv_text,
    make_rows,
    markdown_lines,
    markdown_table,
    terminal_table,
)

NOTES = (
    "FLOPs are useful forward FLOPs a token (visible pairs only); training costs three times as much. Losses are final "
    "validation losses in nats a token, bits are per UTF-8 byte; ± is the half-width of a 95 % Student-t interval over "
    "n seeds; differences are in bits per byte, paired by seed (same data order, same initial weights where shapes "
    "agree). Tokens/s is the median, peak GiB the largest of the seeds."
)


def report(comparison: Comparison, workdir: str, runs: Sequence[Run]) -> str:
    """Writes `comparison.md`, `.csv` and `.png` into `workdir`, and returns the table and its sentences as text. Of
    several arms also `comparison_differences.png`, of arms trained at three sizes or more `comparison_scaling.png` and
    a table of the fits, of runs that measured accuracy by length `comparison_lengths.png` and a table of it.

    Raises:
      ValueError: when no run is finished, or all have diverged; nothing is written then.
    """
    if "longer" in comparison.controls:
        runs = [*runs, *longer_runs(comparison, runs)]
    arms = list(dict.fromkeys(run.arm for run in runs))
    found = read_results(workdir, runs)
    rows = make_rows(found.usable, arms)
    if not rows:
        why = " ".join(verdict.left_out(found, comparison)) or "there is nothing of this comparison."
        raise ValueError(f"--workdir={workdir}: no finished run to report. {why}")
    over_sizes = scaling.over_sizes(runs)
    sizes = scaling.measured(rows) if over_sizes else []
    swept = "" if over_sizes else verdict.swept_name(runs)  # the best of several sizes says nothing
    best = best_of(rows, comparison.arms[0]) if swept else None
    sections = [("Same setting" if best else "", rows, verdict.differences(rows, comparison.arms[0]))]
    if best:
        words = verdict.choice(rows, best, runs)
        sections.append((f"Best of its {swept}", best, verdict.differences(best, comparison.arms[0]) + words))
    shown, folder = best or rows, epath.Path(workdir)
    evaluations = read_evaluations(workdir, shown)
    remarks = [
        *verdict.mismatches(rows),
        *verdict.seeds(rows),
        *verdict.inconsistencies(found.usable, comparison),
        *verdict.left_out(found, comparison),
        *verdict.devices(found.usable),
        *evaluations.remarks,
    ]
    chapters = [*_differences(shown, folder), *_scaling(sizes, folder), *_lengths(shown, folder)]
    if evaluations.cells:
        lines = evaluation_lines(evaluations, [row.label for row in shown])
        tables = markdown_lines(lines, texts=2), aligned(lines, texts=2)
        chapters.append(Chapter("Evaluations", "", *tables, EVALUATION_NOTES))
    (folder / "comparison.md").write_text(_markdown(sections, chapters, remarks), encoding="utf-8")
    (folder / "comparison.csv").write_text(csv_text(found.results), encoding="utf-8")
    draw(shown, folder / "comparison.png")
    blocks = [block for title, part, words in sections for block in (title, terminal_table(part), "\n".join(words))]
    blocks += [block for c in chapters if c.terminal for block in (c.title, c.terminal, c.notes)]
    blocks += ["\n".join(remarks), NOTES, f"wrote {folder}/comparison.md, .csv and .png"]
    return "\n" + "\n\n".join(block for block in blocks if block)


@dataclass(frozen=True)
class Chapter:
    """A part of the report that only some comparisons have; its picture is written already."""

    title: str
    picture: str
    markdown: str
    terminal: str
    notes: str


def _differences(rows: Sequence[Row], folder: epath.Path) -> list[Chapter]:
    """The picture alone: the table and the sentences hold its numbers."""
    differing = [row for row in rows if row.difference is not None]
    if len(differing) < 2:
        return []
    draw_differences(differing, folder / "comparison_differences.png")
    return [Chapter("Differences", "comparison_differences.png", "", "", "")]


def _scaling(arms: Sequence[scaling.Scaling], folder: epath.Path) -> list[Chapter]:
    if not arms:
        return []
    scaling.draw_scaling(arms, folder / "comparison_scaling.png")
    lines = scaling.scaling_table(arms)
    return [Chapter(scaling.TITLE, "comparison_scaling.png", markdown_lines(lines), aligned(lines), scaling.NOTES)]


def _lengths(rows: Sequence[Row], folder: epath.Path) -> list[Chapter]:
    if not lengths.measured(rows):
        return []
    lengths.draw_lengths(rows, folder / "comparison_lengths.png")
    lines = lengths.length_table(rows)
    return [Chapter(lengths.TITLE, "comparison_lengths.png", markdown_lines(lines), aligned(lines), lengths.NOTES)]


def _markdown(
    sections: Sequence[tuple[str, Sequence[Row], Sequence[str]]], chapters: Sequence[Chapter], remarks: Sequence[str]
) -> str:
    blocks = ["# Comparison", "![loss curves](comparison.png)"]
    for title, rows, words in sections:
        blocks += [f"## {title}" if title else "", markdown_table(rows), _bullets(words)]
    for chapter in chapters:
        picture = f"![{chapter.title.lower()}]({chapter.picture})" if chapter.picture else ""
        blocks += [f"## {chapter.title}", picture, chapter.markdown, chapter.notes]
    if chapters:
        blocks.append("## Remarks")
    return "\n\n".join(block for block in [*blocks, _bullets(remarks), NOTES] if block) + "\n"


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
