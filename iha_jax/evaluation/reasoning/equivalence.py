"""Whether two LaTeX answers are the same, by `math-verify`, in a process of its own under a time limit.

Its own limit is an alarm, which simplifying a large power never hears; and parsing may take any amount of memory.
"""

import functools
import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from typing import Any

MEMORY_BYTES = 4 * 2**30


class Equivalence:
    """Compares answers. `given_up` counts comparisons that took longer than `seconds` or ended the process (memory).

    They count as not equal.

    Use as a context manager: the process behind it ends with it. Raises ValueError where `math-verify` is missing.
    """

    def __init__(self, seconds: float = 10.0):
        self.given_up = 0
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[tuple[str, str], bool] = {}

    def __enter__(self) -> "Equivalence":
        try:
            import math_verify  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("task math500 needs the library math-verify: pip install 'iha_jax[eval]'") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def same(self, gold: str, answer: str) -> bool:
        """Whether `answer` equals `gold`, both LaTeX without dollar signs. Equal strings are equal."""
        if gold.strip() == answer.strip():
            return True
        key = (gold, answer)
        if key not in self._known:
            self._known[key] = self._ask(gold, answer)
        return self._known[key]

    def _ask(self, gold: str, answer: str) -> bool:
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            return self._give_up()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(self._seconds):
                return self._give_up()
        line = process.stdout.readline()
        if not line:  # out of memory, or a crash of the interpreter
            return self._give_up()
        return line.strip() == b"true"

    def _give_up(self) -> bool:
        self.given_up += 1
        self._stop()
        return False

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parents[3])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, "-m", "iha_jax.evaluation.reasoning.equivalence"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":  # importing is not part of any comparison's time
            process.kill()
            process.wait()
            raise RuntimeError("the process that compares answers with math-verify does not start")
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@functools.cache
def _parsed(answer: str) -> list[Any]:
    import math_verify  # pyright: ignore[reportMissingImports]

    parse: Any = math_verify.parse  # its stubs do not know that None is no limit
    return parse(f"$\\boxed{{{answer}}}$", parsing_timeout=None)


def _equal(gold: str, answer: str) -> bool:
    from math_verify import verify  # pyright: ignore[reportMissingImports]

    return bool(verify(_parsed(gold), _parsed(answer), timeout_seconds=None))


def _serve() -> None:
    import resource

    import math_verify  # noqa: F401  # pyright: ignore[reportMissingImports]

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answers, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        try:
            same = _equal(gold, answer)
        except Exception:  # whatever sympy raises for text that is no mathematics
            same = False
        print(json.dumps(same), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
