"""What a run leaves behind: a table on the terminal, a CSV with everything it rests on, and a picture."""

import csv
import dataclasses
import datetime
import importlib.metadata
import os
import platform
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.harness import Row
from benchmarks.torch_process import DESCRIPTION
from iha_jax.comparison.figure import COLORS

LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "torch", "tokamax")


def device_name() -> str:
    """The accelerator's name; for a CPU its model and how many cores this process may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def environment(matmul_flops: float) -> dict[str, Any]:
    """Where and with what the numbers were made; part of every line of the CSV."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    facts = {"date": date, "device": device_name(), "backend": jax.default_backend(), **versions}
    facts["python"] = platform.python_version()
    return facts | {"matmul_flops_per_second": matmul_flops}


def file_stem(command: str, facts: dict[str, Any]) -> str:
    """`command_date_device_jax-version`, safe for a file name."""
    device = re.sub(r"[^A-Za-z0-9]+", "-", facts["device"]).strip("-")
    return f"{command}_{facts['date'].replace(':', '')}_{device}_jax-{facts['jax']}"


def heading(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {facts[name]}" for name in LIBRARIES if facts[name])
    rate = facts["matmul_flops_per_second"] / 1e9
    text = f"{facts['date']} · {facts['device']} · {versions} · jax matmul {rate:.1f} GFLOP/s"
    if DESCRIPTION:
        text += f" · torch on {DESCRIPTION['device']}, {DESCRIPTION['threads']} threads"
    return text


def table(title: str, rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """One size: the timed rows, then why others are missing. GFLOP/s are useful ones; "executed": what is computed for
    them, as a multiple, where it is known."""
    header = (
        "candidate",
        "median ms",
        "quartiles ms",
        "ratio",
        "GFLOP/s",
        "of matmul",
        "executed",
        "temp MiB",
        "error",
    )
    lines: list[tuple[str, ...]] = [header]
    for row in rows:
        if row.seconds is None:
            continue
        rate = row.useful_flops / row.seconds.median
        memory = "" if row.temporary_bytes is None else f"{row.temporary_bytes / 2**20:.1f}"
        quartiles = f"{1e3 * row.seconds.lower:.1f} - {1e3 * row.seconds.upper:.1f}"
        of_matmul = f"{100 * rate / facts['matmul_flops_per_second']:.1f} %"
        numbers = (f"{1e3 * row.seconds.median:.1f}", quartiles, f"{row.ratio:.2f}", f"{rate / 1e9:.1f}", of_matmul)
        executed = "" if row.executed_flops is None else f"{row.executed_flops / row.useful_flops:.2f}"
        lines.append((row.label, *numbers, executed, memory, f"{row.error:.0e}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [title]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        text.append("  " + "  ".join([line[0].ljust(widths[0]), *cells]))
    text += [f"  {row.label}: {row.status}: {row.reason}" for row in rows if row.seconds is None]
    return "\n".join(text)


def csv_row(row: Row, facts: dict[str, Any]) -> dict[str, Any]:
    """A flat record; times in seconds, memory in bytes, FLOPs of one run."""
    record = facts | {"group": row.group, "name": row.name} | dataclasses.asdict(row.workload)
    record |= {"status": row.status, "reason": row.reason, "error": row.error, "repetitions": row.repetitions}
    spread = dataclasses.asdict(row.seconds) if row.seconds else {}
    record |= {f"{name}_s": spread.get(name) for name in ("median", "lower", "upper", "least", "most")}
    rate = row.useful_flops / row.seconds.median if row.seconds else None
    record |= {"ratio": row.ratio, "useful_flops": row.useful_flops, "useful_flops_per_second": rate}
    record["fraction_of_matmul"] = None if rate is None else rate / facts["matmul_flops_per_second"]
    record["executed_flops"] = row.executed_flops
    record |= {"least_bytes": row.least_bytes, "temporary_bytes": row.temporary_bytes}
    return record | {"memory_method": row.memory_method}


def write_csv(rows: Sequence[Row], facts: dict[str, Any], path: Path) -> None:
    records = [csv_row(row, facts) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)


SWEEPS = (("tokens", "N, tokens"), ("pseudo_heads", "P, pseudo-heads"))
QUANTITIES: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
    ("milliseconds (median; bar: quartiles)", lambda row: 1e3 * row.seconds.median if row.seconds else None),
    ("temporary memory, MiB", lambda row: None if row.temporary_bytes is None else row.temporary_bytes / 2**20),
)
STYLES = ("-", "--", ":", "-.")


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By label: a group has a line style, its members have colors, ours are thick."""
    names: dict[str, list[str]] = {}
    for row in rows:
        members = names.setdefault(row.group, [])
        if row.name not in members:
            members.append(row.name)
    return {
        f"{group} · {name}": {
            "color": COLORS[i % len(COLORS)],
            "ls": STYLES[g % len(STYLES)],
            "lw": 2.8 if name.startswith("ours") else 1.3,
            "marker": "osD^v"[i // len(COLORS) % 5],
        }
        for g, (group, members) in enumerate(names.items())
        for i, name in enumerate(members)
    }


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Time and memory against N and against P: what lies on the first workload's line through each."""
    timed = [row for row in rows if row.seconds]
    first = rows[0].workload
    figure = Figure(figsize=(13, 9), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, squeeze=False)
    handles: dict[str, Any] = {}
    for column, (field, axis) in enumerate(SWEEPS):
        other = SWEEPS[1 - column][0]
        line = [row for row in timed if getattr(row.workload, other) == getattr(first, other)]
        for panel, (quantity, value) in zip(panels[:, column], QUANTITIES, strict=True):
            for label, style in _styles(timed).items():
                mine = sorted((row for row in line if row.label == label), key=lambda r: getattr(r.workload, field))
                points = [(getattr(row.workload, field), y, row) for row in mine if (y := value(row)) is not None]
                if not points:
                    continue
                x = [p[0] for p in points]
                handles[label] = panel.plot(x, [max(p[1], 0.01) for p in points], ms=4, label=label, **style)[0]
                if value is QUANTITIES[0][1]:
                    low, high = ([1e3 * getattr(p[2].seconds, side) for p in points] for side in ("lower", "upper"))
                    panel.vlines(x, low, high, color=style["color"], lw=4, alpha=0.3)
            _dress(panel, axis, quantity, sorted({getattr(row.workload, field) for row in line}))
            panel.set_title(f"{other.replace('_', '-')} = {getattr(first, other)}", fontsize=9)
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=3, frameon=False, handlelength=4)
    figure.suptitle("\n".join(textwrap.wrap(title, 130)), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(os.fspath(path), format="png")


def _dress(panel: Any, x_label: str, y_label: str, ticks: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel(x_label)
    panel.set_ylabel(y_label)
    panel.grid(alpha=0.3)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def headline(rows: Sequence[Row], ours: str, theirs: str) -> str | None:
    """Time and memory of the fastest timed candidate whose label contains `ours` over that of `theirs`; None without
    both."""

    def best(part: str) -> Row | None:
        timed = [row for row in rows if row.seconds and part in row.label]
        return min(timed, key=lambda row: row.seconds.median if row.seconds else 0.0, default=None)

    a, b = best(ours), best(theirs)
    if a is None or b is None or a.seconds is None or b.seconds is None:
        return None
    text = f"  {a.label} / {b.label}: time {a.seconds.median / b.seconds.median:.3f}"
    if a.temporary_bytes is not None and b.temporary_bytes:
        text += f", temporary memory {a.temporary_bytes / b.temporary_bytes:.4f}"
    return text


def finish(command: str, rows: Sequence[Row], facts: dict[str, Any], out: Path) -> str:
    """Writes the CSV and the picture; says where."""
    stem = file_stem(command, facts)
    write_csv(rows, facts, out / f"{stem}.csv")
    draw(rows, f"{command}: {heading(facts)}", out / f"{stem}.png")
    return f"wrote {out / stem}.csv and .png"
