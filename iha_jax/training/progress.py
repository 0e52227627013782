"""What a terminal sees of a run: a progress bar there, plain lines elsewhere."""

import sys
from typing import Any, Self, TextIO

from tqdm import tqdm

from iha_jax.parallel.processes import is_first


def tell(text: str) -> None:
    """What is to be said before there is a `Progress`; process 0 says it."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


class Progress:
    """`update` after each training row, `message` for everything else; both go to `stream` (stderr), unless `quiet`."""

    def __init__(self, steps: int, start_step: int, stream: TextIO | None = None, *, quiet: bool = False):
        self._stream = stream or sys.stderr
        self._steps = steps
        self._quiet = quiet
        self._bar: tqdm | None = None
        if self._stream.isatty() and not quiet:
            self._bar = tqdm(total=steps, initial=start_step, unit="step", file=self._stream, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, step: int, row: dict[str, Any]) -> None:
        loss = row["loss"] if row["loss"] is not None else float("nan")
        rate = f"{row['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate}")
            self._bar.update(step - self._bar.n)
            return
        left = row["seconds"] / step * (self._steps - step)
        self.message(f"step {step}/{self._steps}: loss {loss:.4f}, {rate}, {_duration(left)} left")

    def validated(self, step: int, row: dict[str, Any]) -> None:
        self.message(f"step {step}: validation loss {row['loss']:.4f}, {row['bits_per_byte']:.4f} bits per byte")

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif not self._quiet:
            print(text, file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
