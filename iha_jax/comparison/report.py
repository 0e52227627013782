"""The report of a comparison, made from its run directories alone."""

from collections.abc import Sequence

from etils import epath

from iha_jax.comparison import lengths, verdict
from iha_jax.comparison.arms import Comparison, longer_runs
from iha_jax.comparison.evaluations import NOTES as EVALUATION_NOTES
from iha_jax.comparison.evaluations import markdown, read_evaluations, terminal
from iha_jax.comparison.figure import draw
from iha_jax.comparison.results import read_results
from iha_jax.comparison.runs import Run
from iha_jax.comparison.table import Row, best_of, csv_text, make_rows, markdown_table, terminal_table

NOTES = (
    "FLOPs are useful forward FLOPs a token (visible pairs only); training costs three times as much. Losses are final "
    "validation losses in nats a token, bits are per UTF-8 byte; ± is the half-width of a 95 % Student-t interval over "
    "n seeds; differences are in bits per byte, paired by seed (same data order, same initial weights where shapes "
    "agree). Tokens/s is the median, peak GiB the largest of the seeds."
)


def report(comparison: Comparison, workdir: str, runs: Sequence[Run]) -> str:
    """Writes `comparison.md`, `.csv` and `.png` into `workdir`, and returns the table and its sentences as text; of
    runs that measured accuracy by length also `comparison_lengths.png` and a table of it.

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
    swept = verdict.swept_name(runs)
    best = best_of(rows, comparison.arms[0]) if swept else None
    sections = [("Same setting" if best else "", rows, verdict.differences(rows, comparison.arms[0]))]
    if best:
        words = verdict.choice(rows, best, runs)
        sections.append((f"Best of its {swept}", best, verdict.differences(best, comparison.arms[0]) + words))
    evaluations, labels = read_evaluations(workdir, best or rows), [row.label for row in best or rows]
    remarks = [
        *verdict.mismatches(rows),
        *verdict.seeds(rows),
        *verdict.inconsistencies(found.usable, comparison),
        *verdict.left_out(found, comparison),
        *verdict.devices(found.usable),
        *evaluations.remarks,
    ]
    folder = epath.Path(workdir)
    evaluated = markdown(evaluations, labels) if evaluations.cells else ""
    by_length = lengths.length_table(best or rows) if lengths.measured(best or rows) else []
    if by_length:
        lengths.draw_lengths(best or rows, folder / "comparison_lengths.png")
    (folder / "comparison.md").write_text(_markdown(sections, by_length, evaluated, remarks), encoding="utf-8")
    (folder / "comparison.csv").write_text(csv_text(found.results), encoding="utf-8")
    draw(best or rows, folder / "comparison.png")
    blocks = [block for title, part, words in sections for block in (title, terminal_table(part), "\n".join(words))]
    blocks += [lengths.TITLE, lengths.terminal(by_length), lengths.NOTES] if by_length else []
    blocks += [terminal(evaluations, labels), EVALUATION_NOTES] if evaluated else []
    blocks += ["\n".join(remarks), NOTES, f"wrote {folder}/comparison.md, .csv and .png"]
    return "\n" + "\n\n".join(block for block in blocks if block)


def _markdown(
    sections: Sequence[tuple[str, Sequence[Row], Sequence[str]]],
    by_length: Sequence[Sequence[str]],
    evaluated: str,
    remarks: Sequence[str],
) -> str:
    blocks = ["# Comparison", "![loss curves](comparison.png)"]
    for title, rows, words in sections:
        blocks += [f"## {title}" if title else "", markdown_table(rows), _bullets(words)]
    if by_length:
        picture = "![accuracy against length](comparison_lengths.png)"
        blocks += [f"## {lengths.TITLE}", picture, lengths.markdown(by_length), lengths.NOTES]
    if evaluated:
        blocks += ["## Evaluations", evaluated, EVALUATION_NOTES]
    if by_length or evaluated:
        blocks.append("## Remarks")
    return "\n\n".join(block for block in [*blocks, _bullets(remarks), NOTES] if block) + "\n"


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
