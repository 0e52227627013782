"""The sandbox contains hostile programs, judges them failed, and lets honest ones pass."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iha_jax.evaluation import sandbox, sandbox_check
from iha_jax.evaluation.sandbox import Limits, run_program, run_programs

LIMITS = Limits(cpu_seconds=3, wall_seconds=20.0, memory_bytes=256 * 2**20, output_bytes=65536)
SHORT = Limits(cpu_seconds=9, wall_seconds=0.7)


def _missing() -> str:
    if shutil.which("bwrap") is None:
        return "bubblewrap (bwrap) is not installed"
    verdict = run_program("")
    return "" if verdict.passed else f"bubblewrap does not work here: {verdict.output}"


MISSING = _missing()
contained = pytest.mark.skipif(bool(MISSING), reason=MISSING or "bubblewrap works here")


@contained
def test_honest_programs_pass_and_wrong_ones_fail():
    honest = """
import dataclasses, hashlib, heapq, math, re, threading
@dataclasses.dataclass
class Point:
    x: int
assert Point(3) == Point(3) and hashlib.md5(b"").hexdigest().startswith("d41d")
with open("/tmp/x", "w") as file: file.write("kept")
assert open("/tmp/x").read() == "kept"
seen = []
worker = threading.Thread(target=lambda: seen.append(1)); worker.start(); worker.join()
assert seen == [1]
print("done")
"""
    good, wrong, broken = run_programs([honest, "assert 1 + 1 == 3, 'sum'", "def f(:"], LIMITS)
    assert (good.reason, good.output) == ("passed", "done\n")
    assert wrong.reason == "failed"
    assert "AssertionError: sum" in wrong.output
    assert broken.reason == "failed"
    assert "SyntaxError" in broken.output


@contained
@pytest.mark.parametrize(
    "leave",
    [
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import sys; sys.exit()",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os; os.closerange(0, 99); os._exit(0)",
        "import atexit, os; atexit.register(os._exit, 0); raise SystemExit(1)",
        "import os; os.execv('/python/bin/' + os.listdir('/python/bin')[0], ['python', '-c', 'pass'])",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'0' * 32)\n    except OSError: pass\nos._exit(0)",
    ],
)
def test_leaving_before_the_tests_ran_is_failing(leave):
    verdict = run_program(f"{leave}\nassert False", LIMITS)
    assert verdict.reason == "failed"


@contained
def test_the_checks_that_it_makes_of_itself_hold_here():
    assert sandbox_check._self_test() is None


@contained
def test_no_network_files_environment_or_home(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_TOKEN", "shown")
    (tmp_path / "file").write_text("read")
    outside = sorted({str(tmp_path), str(Path.home()), str(Path.cwd())} - {"/tmp"})  # it has a /tmp of its own
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        verdict = run_program(
            f"""
import os, socket
def refused(act):
    try:
        act()
    except OSError:
        return True
    return False
assert refused(lambda: socket.create_connection(("127.0.0.1", {port}), 3))
assert refused(lambda: socket.create_connection(("1.1.1.1", 80), 3))
assert "SECRET_TOKEN" not in os.environ
for place in {outside} + ["/etc/passwd", "/proc", "/sys", "/bin/sh"]:
    assert refused(lambda: os.stat(place)), place
for place in ("/x", "/usr/lib/x", "/python/x", "/dev/x", os.__file__):
    assert refused(lambda: open(place, "a")), place
assert os.getuid() != 0 and refused(lambda: os.setuid(0)) and refused(lambda: os.chroot("/tmp"))
""",
            LIMITS,
        )
    assert verdict.passed, verdict.output


@contained
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = bytearray(300 * 2**20)", "failed"),
        ("import os\nwhile True:\n    os.fork()", "failed"),
        ("while True:\n    print('x' * 1000)", "output"),
        ("import os\nwhile True:\n    os.write(2, b'x' * 1000)", "output"),
        ("for i in range(99): open(f'/tmp/{i}', 'wb').write(bytes(2**20))", "failed"),
        ("for i in range(99): open(f'/dev/shm/{i}', 'wb').write(bytes(2**20))", "failed"),
        ("import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)\nassert False", "failed"),
        ("def f(): f()\nf()", "failed"),
    ],
)
def test_hostile_programs_are_contained(program, reason):
    verdict = run_program(program, LIMITS)
    assert verdict.reason == reason, verdict.output
    assert len(verdict.output) <= 2000


@contained
@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(99)",
        "import os, time; os.closerange(0, 99); time.sleep(99)",
        "import signal, time\nfor s in {*range(1, 32)} - {9, 19}: signal.signal(s, signal.SIG_IGN)\ntime.sleep(99)",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(99)\ntime.sleep(99)",
    ],
)
def test_what_never_ends_is_ended_in_time(program):
    start = time.monotonic()
    assert run_program(program, SHORT).reason == "timeout"
    assert time.monotonic() - start < 10


@contained
def test_cpu_time_is_limited_even_where_wall_time_is_not():
    verdict = run_program("while True: pass", Limits(cpu_seconds=1, wall_seconds=60.0))
    assert verdict.reason == "timeout"
    assert verdict.seconds < 30


@contained
def test_what_a_program_leaves_running_dies_with_it(monkeypatch):
    mark = f"left_{os.getpid()}_{time.monotonic_ns()}"
    command = sandbox._command

    def marked(*args, **kwargs):
        words = command(*args, **kwargs)
        at = words.index("--")
        return [*words[:at], "--setenv", "MARK", mark, *words[at:]]

    monkeypatch.setattr(sandbox, "_command", marked)
    fork = "import os, time\nif os.fork() == 0:\n    time.sleep(99)\n"
    assert run_program(f"{fork}assert os.environ['MARK'] == {mark!r}", LIMITS).passed
    assert run_program(f"{fork}time.sleep(99)", SHORT).reason == "timeout"
    until = time.monotonic() + 5
    while (left := _alive(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left


def _alive(mark: str) -> list[str]:
    """Processes with the mark in their arguments or environment; a zombie has neither."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                if mark.encode() in (folder / name).read_bytes():
                    found.append(f"{folder.name} {name}")
            except OSError:
                continue
    return found


def test_permission_is_asked_for_before_anything_else(monkeypatch):
    monkeypatch.setattr(sandbox_check, "_self_test", lambda: pytest.fail("tested before permission"))
    with pytest.raises(ValueError, match="--allow_code_execution"):
        sandbox_check.require(allowed=False)


def test_without_bubblewrap_it_refuses_and_says_what_to_install(tmp_path):
    """In a process of its own: the self-test is remembered."""
    program = "from iha_jax.evaluation import sandbox_check\nsandbox_check.require(allowed=True)"
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(Path(sandbox.__file__).parents[2])}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert "ValueError" in found.stderr
    assert "apt-get install bubblewrap" in found.stderr
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho bubblewrap 0.6.1\n")
    (tmp_path / "bwrap").chmod(0o755)
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert "bubblewrap 0.6.1 is older than 0.8" in found.stderr


@contained
def test_a_sandbox_that_contains_nothing_is_found_out(monkeypatch):
    """The self-test fails when each wall is taken away."""
    command = sandbox._command

    def without(*options):
        def changed(*args, **kwargs):
            return [word for word in command(*args, **kwargs) if word not in options]

        monkeypatch.setattr(sandbox, "_command", changed)
        return sandbox_check._self_test.__wrapped__()

    assert without("--unshare-net") == "the network is open"
    launcher = sandbox._LAUNCHER
    for limit, failure in (
        ('("AS", limits["memory_bytes"]),', "memory has no limit"),
        ('("NPROC", limits["processes"]),', "processes have no limit"),
    ):
        assert limit in launcher
        monkeypatch.setattr(sandbox, "_command", command)
        monkeypatch.setattr(sandbox, "_LAUNCHER", launcher.replace(limit, ""))
        assert sandbox_check._self_test.__wrapped__() == failure
