"""The comparison as a table and as CSV."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iha_jax.accounting import Flops, Parameters, count_parameters, flops_per_token
from iha_jax.comparison.results import Result
from iha_jax.comparison.statistics import Estimate, estimate, paired_difference
from iha_jax.overrides import settings_name


@dataclass(frozen=True)
class Row:
    """One arm in one setting, over its seeds."""

    label: str
    arm: str
    results: list[Result]
    parameters: Parameters
    flops: Flops
    loss: Estimate
    bits_per_byte: Estimate
    baseline: str  # label of what `difference` compares with; empty for the first arm, or when it has nothing there
    difference: Estimate | None  # in bits per byte, paired by seed
    tokens_per_second: float
    peak_memory_bytes: float


def make_rows(results: Sequence[Result], arms: Sequence[str]) -> list[Row]:
    """A row an arm, in the order of `arms`, and where an arm had several settings one each, in order of appearance.

    A row is compared with the first arm at the same settings, for instance the same learning rate. `results` must be
    finished and must not have diverged.
    """
    settings: list[tuple[tuple[str, Any], ...]] = []
    groups: dict[tuple[int, int], list[Result]] = {}
    for result in results:
        if result.run.settings not in settings:
            settings.append(result.run.settings)
        place = arms.index(result.run.arm), settings.index(result.run.settings)
        groups.setdefault(place, []).append(result)
    return [make_row(groups[arm, at], groups.get((0, at)) if arm else None) for arm, at in sorted(groups)]


def make_row(group: Sequence[Result], baseline: Sequence[Result] | None) -> Row:
    """The row of the runs of one setting, compared with those of `baseline` if there are any."""
    group = sorted(group, key=lambda result: result.run.seed)
    model = group[0].config.model

    def by_seed(results: Sequence[Result]) -> dict[int, float]:
        return {r.run.seed: r.final["bits_per_byte"] for r in results}

    return Row(
        label=group[0].run.setting,
        arm=group[0].run.arm,
        results=group,
        parameters=count_parameters(model),
        flops=flops_per_token(model),
        loss=estimate([r.final["loss"] for r in group]),
        bits_per_byte=estimate([r.final["bits_per_byte"] for r in group]),
        baseline=baseline[0].run.setting if baseline else "",
        difference=paired_difference(by_seed(group), by_seed(baseline)) if baseline else None,
        tokens_per_second=statistics.median(r.tokens_per_second for r in group),
        peak_memory_bytes=max(r.final["peak_memory_bytes"] for r in group),
    )


def best_of(rows: Sequence[Row], first: str) -> list[Row]:
    """Each arm at the settings with its lowest mean bits per byte, compared with arm `first` at its own.

    Of an arm's settings only those with its largest number of seeds are candidates: one at which a seed diverged, or
    is not finished, must not win by the seeds that are left.
    """
    chosen: dict[str, Row] = {}
    for arm in dict.fromkeys(row.arm for row in rows):
        candidates = [row for row in rows if row.arm == arm]
        most = max(len(row.results) for row in candidates)
        chosen[arm] = min(
            (row for row in candidates if len(row.results) == most), key=lambda row: row.bits_per_byte.mean
        )
    baseline = chosen[first].results if first in chosen else None
    return [make_row(row.results, None if arm == first else baseline) for arm, row in chosen.items()]


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
    "settings",
    "seed",
    "learning_rate",
    "finished",
    "step",
    "parameters",
    "attention_parameters",
    "mixing_parameters",
    "flops_per_token",
    "projection_flops",
    "score_flops",
    "mixing_flops",
    "mlp_flops",
    "output_flops",
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


WIDEST = 8  # arms that are columns; more are lines, with fewer facts each
BRIEF = ("arm", "parameters", "mixing", "FLOPs/token", "val loss", "bits/byte", "difference", "tokens/s")


def table_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines of the table: an arm a column, which fits a terminal where an arm a line would not; of more than
    eight arms a line each."""
    columns = [list(COLUMNS), *(cells(row) for row in rows)]
    if len(rows) > WIDEST:
        return [[texts[COLUMNS.index(name)] for name in BRIEF] for texts in columns]
    return [list(texts) for texts in zip(*columns, strict=True)]


def terminal_table(rows: Sequence[Row]) -> str:
    return aligned(table_lines(rows))


def markdown_table(rows: Sequence[Row]) -> str:
    return markdown_lines(table_lines(rows))


def aligned(lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """For a terminal: columns as wide as their longest cell, the first `texts` to the left and numbers to the right, a
    rule below the first line."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [text.ljust(w) if i < texts else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    first, *rest = ("  ".join(line).rstrip() for line in padded)
    return "\n".join([first, "-" * sum(widths, 2 * len(widths) - 2), *rest])


def markdown_lines(lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    header, *rest = ("| " + " | ".join(cells) + " |" for cells in lines)
    rule = "|---" * texts + "|---:" * (len(lines[0]) - texts) + "|"
    return "\n".join([header, rule, *rest])


def csv_text(results: Sequence[Result]) -> str:
    """A line a run: what it was, how it ended (an empty loss: diverged), what it cost."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for r in results:
        if not r.val or not r.train:
            continue
        parameters, flops, final = count_parameters(r.config.model), flops_per_token(r.config.model), r.final
        settings = settings_name(dict(r.run.settings))
        line: list[Any] = [r.run.arm, settings, r.run.seed, r.config.optimizer.learning_rate, r.finished, final["step"]]
        line += [parameters.total, parameters.attention, parameters.mixing]
        line += [flops.total, flops.projections, flops.scores, flops.mixing, flops.mlp, flops.output]
        line += [final[name] for name in ("loss", "bits_per_byte", "tokens", "flops", "seconds")]
        writer.writerow([*line, r.tokens_per_second, final["peak_memory_bytes"]])
    return out.getvalue()
