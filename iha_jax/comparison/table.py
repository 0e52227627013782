"""The comparison as a table, in words, and as CSV."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iha_jax.accounting import Flops, Parameters, count_parameters, flops_per_token
from iha_jax.comparison.results import Result
from iha_jax.comparison.statistics import Estimate, estimate, paired_difference

PARAMETER_TOLERANCE, FLOPS_TOLERANCE = 0.01, 0.05


@dataclass(frozen=True)
class Row:
    """One arm in one setting, over its finished seeds."""

    label: str
    arm: str
    results: list[Result]
    parameters: Parameters
    flops: Flops
    loss: Estimate
    bits_per_byte: Estimate
    difference: Estimate | None  # in bits per byte, to the first row, paired by seed
    tokens_per_second: float
    peak_memory_bytes: float


def make_rows(results: Sequence[Result], arms: Sequence[str]) -> list[Row]:
    """A row an arm (in the order of `arms`, then others), and where an arm had several learning rates one each."""
    finished = [result for result in results if result.finished]
    order = [*arms, *sorted({r.arm for r in finished} - set(arms))]
    groups: dict[tuple[str, float | None], list[Result]] = {}
    for arm in order:
        for result in finished:
            if result.arm == arm:
                groups.setdefault((arm, result.learning_rate), []).append(result)
    rows: list[Row] = []
    for (arm, rate), group in groups.items():
        baseline = next((g for (a, r), g in groups.items() if a == order[0] and r == rate), group)
        rows.append(make_row(arm if rate is None else f"{arm} lr {rate:g}", arm, group, baseline))
    return rows


def make_row(label: str, arm: str, group: list[Result], baseline: list[Result]) -> Row:
    model = group[0].config.model

    def by_seed(results: list[Result]) -> dict[int, float]:
        return {r.seed: r.final["bits_per_byte"] for r in results}

    return Row(
        label=label,
        arm=arm,
        results=group,
        parameters=count_parameters(model),
        flops=flops_per_token(model),
        loss=estimate([r.final["loss"] for r in group]),
        bits_per_byte=estimate([r.final["bits_per_byte"] for r in group]),
        difference=None if group is baseline else paired_difference(by_seed(group), by_seed(baseline)),
        tokens_per_second=statistics.median(r.tokens_per_second for r in group),
        peak_memory_bytes=max(r.final["peak_memory_bytes"] for r in group),
    )


def best_of(rows: Sequence[Row], arms: Sequence[str]) -> list[Row]:
    """Each arm at the learning rate with its lowest mean bits per byte, compared with the first arm at its own."""
    chosen: list[Row] = []
    for arm in [*arms, *dict.fromkeys(row.arm for row in rows if row.arm not in arms)]:
        candidates = [row for row in rows if row.arm == arm]
        if candidates:
            best = min(candidates, key=lambda row: row.bits_per_byte.mean)
            chosen.append(make_row(best.label, arm, best.results, chosen[0].results if chosen else best.results))
    return chosen


COLUMNS = (
    "arm",
    "parameters",
    "attention",
    "mixing",
    "FLOPs/token",
    "projections",
    "scores",
    "mixing+collapse",
    "MLP",
    "output",
    "val loss",
    "bits/byte",
    "difference",
    "tokens/s",
    "peak GiB",
)


CSV_COLUMNS = (
    "arm",
    "seed",
    "learning_rate",
    "finished",
    "step",
    "parameters",
    "mixing_parameters",
    "flops_per_token",
    "loss",
    "bits_per_byte",
    "tokens",
    "flops",
    "seconds",
    "tokens_per_second",
    "peak_memory_bytes",
)


def cells(row: Row) -> list[str]:
    flops = row.flops
    return [
        row.label,
        *(f"{n:,}" for n in (row.parameters.total, row.parameters.attention, row.parameters.mixing)),
        *(f"{n:,.0f}" for n in (flops.total, flops.projections, flops.scores, flops.mixing, flops.mlp, flops.output)),
        row.loss.text(),
        row.bits_per_byte.text(),
        "-" if row.difference is None else row.difference.text(),
        f"{row.tokens_per_second:,.0f}",
        f"{row.peak_memory_bytes / 2**30:.2f}",
    ]


def terminal_table(rows: Sequence[Row]) -> str:
    """A table with an arm a column, which fits a terminal where an arm a row would not."""
    columns = [COLUMNS, *(cells(row) for row in rows)]
    widths = [max(len(text) for text in column) for column in columns]
    lines = []
    for texts in zip(*columns, strict=True):
        first, *rest = (
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(texts, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown_table(rows: Sequence[Row]) -> str:
    columns = [COLUMNS, *(cells(row) for row in rows)]
    lines = ["| " + " | ".join(texts) + " |" for texts in zip(*columns, strict=True)]
    return "\n".join([lines[0], "|---" + "|---:" * len(rows) + "|", *lines[1:]])


def csv_text(results: Sequence[Result]) -> str:
    """A line a run: what it was, how it ended, what it cost."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for r in results:
        if not r.val or not r.train:
            continue
        parameters, final = count_parameters(r.config.model), r.final
        line: list[Any] = [r.arm, r.seed, r.config.optimizer.learning_rate, r.finished, final["step"]]
        line += [parameters.total, parameters.mixing, flops_per_token(r.config.model).total]
        line += [final[name] for name in ("loss", "bits_per_byte", "tokens", "flops", "seconds")]
        writer.writerow([*line, r.tokens_per_second, final["peak_memory_bytes"]])
    return out.getvalue()


def verdict(rows: Sequence[Row]) -> list[str]:
    """Sentences: each arm against the first, whether they are matched, whether their data was the same."""
    sentences = []
    first = rows[0]
    for row in rows[1:]:
        if row.difference is None:
            continue
        difference = row.difference
        what = f"{row.label} - {first.arm} = {difference.mean:+.4f}"
        if difference.half_width is None:
            sentences.append(f"{what} bits per byte (n = {difference.n}): one seed, no interval, no verdict.")
        elif difference.distinguishable:
            better = row.label if difference.mean < 0 else first.arm
            sentences.append(
                f"{what} ± {difference.half_width:.4f} bits per byte (n = {difference.n}): {better} is better."
            )
        else:
            sentences.append(
                f"{what} ± {difference.half_width:.4f} bits per byte (n = {difference.n}): not distinguishable."
            )
    for row in rows[1:]:
        sentences += _mismatch(
            row, first, "parameters", row.parameters.total / first.parameters.total, PARAMETER_TOLERANCE
        )
        sentences += _mismatch(row, first, "useful FLOPs a token", row.flops.total / first.flops.total, FLOPS_TOLERANCE)
    for name in ("corpus_digest", "tokenizer_digest", "rows_digest"):
        found = {r.provenance.get(name) for row in rows for r in row.results}
        if len(found) > 1:
            sentences.append(f"WARNING: the runs differ in {name}: they were not trained on the same data.")
    steps = {r.config.training.steps for row in rows for r in row.results if not row.arm.endswith("_longer")}
    if len(steps) > 1:
        sentences.append(f"WARNING: the runs differ in training.steps: {sorted(steps)}.")
    return sentences


def _mismatch(row: Row, first: Row, what: str, ratio: float, tolerance: float) -> list[str]:
    if abs(ratio - 1) <= tolerance:
        return []
    return [f"{row.label} has {ratio - 1:+.1%} {what} against {first.arm}: the arms are not matched in {what}."]
