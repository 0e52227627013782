"""The parent's side of `torch_worker.py`: one process a candidate, asked to prepare, then to run once at a time."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Arrays, Limits
from benchmarks.rivals import Skip

ROOT = Path(__file__).resolve().parent.parent
CPU_MEMORY = "growth of the worker's resident set at its peak, less results"
DESCRIPTION: dict[str, Any] = {}  # what the last worker said of itself: version, threads, device


class TorchPrepared:
    """A PyTorch candidate in its own process. `request`: what `torch_models.attention` or `.training` reads."""

    def __init__(self, kind: str, arrays: Arrays, request: dict[str, Any], limits: Limits):
        if importlib.util.find_spec("torch") is None:
            raise Skip("PyTorch is not installed; it is in the extra 'benchmarks'")
        self._folder = tempfile.TemporaryDirectory()
        self._results = Path(self._folder.name, "results.npz")
        inputs = Path(self._folder.name, "inputs.npz")
        np.savez(inputs, **arrays)  # type: ignore[arg-type]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.torch_worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        own = {"op": "prepare", "kind": kind, "path": str(inputs), "results": str(self._results)}
        try:
            self._answer = self._ask(request | own | {"memory_bytes": limits.memory_bytes})
        except Skip:
            self.close()
            raise
        DESCRIPTION.update({name: self._answer[name] for name in ("torch", "threads", "device")})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:] or ["no message"]
            raise Skip(f"the PyTorch worker died with code {self._process.wait()}: {last[0][:200]}")
        answer = json.loads(line)
        if "error" in answer:
            raise Skip(answer["error"])
        return answer

    def results(self) -> Arrays:
        with np.load(self._results) as file:
            return {name: file[name] for name in file.files}

    def run(self) -> float:
        return self._ask({"op": "run"})["seconds"]

    def temporary_bytes(self) -> int:
        return self._answer["temporary_bytes"]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()
        self._folder.cleanup()
