"""Flags that both commands have."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_common(parser: argparse.ArgumentParser) -> None:
    """Sizes of the sweep, limits, and where results go."""
    parser.add_argument("--tokens", type=integers, help="N, N, ...: all of them at the first P")
    parser.add_argument("--pseudo_heads", type=integers, help="P, P, ...: all of them at the first N")
    parser.add_argument("--only", type=names, default=[], help="parts of labels, any of which a candidate must have")
    parser.add_argument("--without", type=names, default=[], help="parts of labels to leave out")
    parser.add_argument("--repetitions", type=int, default=7, help="rounds of A B C ...")
    parser.add_argument("--memory_gib", type=float, default=12.0, help="candidates that need more are skipped")
    parser.add_argument("--run_seconds", type=float, default=20.0, help="slower candidates are not timed")
    parser.add_argument("--matmul_size", type=int, help="of the square matmul whose rate is the yardstick")
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).parent / "results")


def integers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected numbers of at least 1")
    return numbers


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def cross(tokens: Sequence[int], pseudo_heads: Sequence[int]) -> list[tuple[int, int]]:
    """(N, P): every N at the first P, then every other P at the first N."""
    return [(N, pseudo_heads[0]) for N in tokens] + [(tokens[0], P) for P in pseudo_heads[1:]]
