"""The sandbox tests itself before it is used: hostile programs that it must contain, an honest one that must run."""

import functools
import re
import shutil
import socket
import subprocess
import tempfile

from iha_jax.evaluation.sandbox import INSTALL, Limits, Verdict, run_program, run_programs

_LIMITS = Limits(cpu_seconds=2, wall_seconds=30.0, memory_bytes=256 * 2**20, output_bytes=65536)
_SHORT = Limits(cpu_seconds=2, wall_seconds=1.0)

_HONEST = """
import json, math, threading
worker = threading.Thread(target=math.isqrt, args=(4,))
worker.start()
worker.join()
assert json.loads("[2]") == [2]
"""


def require(*, allowed: bool) -> None:
    """Says that model-written code may run, before any is generated; does nothing more.

    Raises:
      ValueError: without `allowed`, where bubblewrap is missing or older than 0.8, and where a test of the sandbox
        fails; naming the test, and what to install.
    """
    if not allowed:
        raise ValueError(
            "this task runs programs that the model writes: say --allow_code_execution to run them, in a sandbox "
            "without network, files and privileges"
        )
    if failure := _self_test():
        raise ValueError(f"the sandbox for model-written code fails its own test: {failure}; {INSTALL}")


@functools.cache
def _self_test() -> str | None:
    """What does not hold, or None. Run once a process."""
    if shutil.which("bwrap") is None:
        return "no bwrap on the path"
    version = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=False).stdout
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (0, 8):
        return f"{version.strip() or 'bwrap'} is older than 0.8"
    honest = run_program(_HONEST, _LIMITS)
    if not honest.passed:
        return f"an honest program does not run ({_said(honest)})"
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile("w") as secret:
        secret.write("secret")
        secret.flush()
        hostile = _hostile(server.getsockname()[1], secret.name)
        verdicts = run_programs(list(hostile.values()), _LIMITS)
    for name, verdict in zip(hostile, verdicts, strict=True):
        if verdict.passed:
            return name
    for name, program, reason, limits in (
        ("output is not cut", "while True: print('x' * 1000)", "output", _LIMITS),
        ("a program that sleeps is not ended", "import time\ntime.sleep(60)", "timeout", _SHORT),
        ("a loop without end is not ended", "while True: pass", "timeout", _SHORT),
    ):
        verdict = run_program(program, limits)
        if verdict.reason != reason or verdict.seconds > limits.wall_seconds + 5:
            return f"{name} ({_said(verdict)} after {verdict.seconds:.1f} s)"
    return None


def _hostile(port: int, secret: str) -> dict[str, str]:
    """What would not hold: a program that ends well only if it succeeds in it."""
    return {
        "the network is open": f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)",
        "the network has a way out": "import socket\nassert len(socket.if_nameindex()) > 1",
        "files outside can be read": f"open({secret!r}).read()",
        "the root can be written": "open('/written', 'w')",
        "the interpreter can be written": "import os\nopen(os.__file__, 'a')",
        "the environment is seen": "import os\nassert set(os.environ) - {'LD_LIBRARY_PATH', 'HOME', 'LANG', 'PWD'}",
        "it runs as root": "import os\nassert os.getuid() == 0 or os.geteuid() == 0\n",
        "memory has no limit": "x = bytearray(300 * 2**20)",
        "the disk has no limit": "for i in range(3):\n    open(f'/tmp/{i}', 'wb').write(bytes(20 * 2**20))",
        "processes have no limit": (
            "import os, time\nfor i in range(40):\n    if os.fork() == 0:\n        time.sleep(9)\n        os._exit(0)"
        ),
        "leaving early passes": "import os\nos._exit(0)",
        "other processes are seen": "import os\nos.kill(os.getppid(), 9)\nos.kill(1, 0)\nassert os.getppid() != 1",
    }


def _said(verdict: Verdict) -> str:
    lines = verdict.output.strip().splitlines()
    return f"{verdict.reason}: {lines[-1]}" if lines else verdict.reason
