"""A process that runs PyTorch candidates on request, so that jax and PyTorch share no process and memory is measured.

One JSON object a line on standard input, one answer a line on standard output; the last thing prepared is what runs:
    {"op": "prepare", "kind": "attention" | "gpt", "path": inputs.npz, "results": out.npz, ...}  -> versions, memory
    {"op": "run"}                                                                     -> {"seconds": s}
An answer {"error": "..."} says what went wrong; the process lives on. It ends with its standard input.
"""

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Runner = Callable[[], Sequence[Any]]


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _peak_of(run: Runner, torch: Any, device: str) -> tuple[Sequence[Any], int]:
    """The results of one run, and its peak memory beyond what was held before and beyond the results themselves.

    GPU: the allocator's own count. CPU: growth of the resident set, its high-water mark having been reset (Linux).
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        before = _status_bytes("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        results = run()
        peak = _status_bytes("VmHWM")
    held = sum(x.numel() * x.element_size() for x in results if hasattr(x, "numel"))
    return results, max(0, peak - before - held)


class Worker:
    """Holds the one thing prepared."""

    def __init__(self) -> None:
        import torch  # pyright: ignore[reportMissingImports]

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.run: Runner | None = None

    def _synchronize(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        from benchmarks import torch_models

        self.run = None
        with np.load(request["path"]) as file:
            arrays = {name: file[name] for name in file.files}
        if self.device == "cpu" and request["memory_bytes"]:
            used = _status_bytes("VmSize") + 2**30  # libraries, stacks and threads reserve more than they touch
            resource.setrlimit(resource.RLIMIT_AS, (used + request["memory_bytes"], resource.RLIM_INFINITY))
        make = {"attention": torch_models.attention, "gpt": torch_models.training}[request["kind"]]
        run, names = make(self.device, arrays, request)
        checked, peak = {}, 0
        for count in range(request["checked_runs"]):  # the last one's memory counts: by then all is set up and compiled
            results, peak = _peak_of(run, self.torch, self.device)
            for name, x in zip(names, results, strict=True):
                checked[f"{name} of run {count}" if count else name] = x.detach().float().cpu().numpy()
            del results
        np.savez(request["results"], **checked)
        self.run = run
        return {
            "temporary_bytes": peak,
            "torch": self.torch.__version__,
            "threads": self.torch.get_num_threads(),
            "device": self.torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
        }

    def once(self) -> dict[str, Any]:
        if self.run is None:
            raise RuntimeError("nothing is prepared")
        self._synchronize()
        start = time.perf_counter()
        results = self.run()
        self._synchronize()
        seconds = time.perf_counter() - start
        del results
        return {"seconds": seconds}


def serve() -> None:
    """Answers until standard input ends. Whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            worker = worker or Worker()
            answer = worker.prepare(request) if request["op"] == "prepare" else worker.once()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
