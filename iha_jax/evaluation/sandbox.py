"""Programs that a model wrote run here and nowhere else: in bubblewrap, or not at all.

A program sees the interpreter and its standard library, read-only, and an empty /tmp of its own: no network, no home,
no working directory, no environment, no other process. It runs as a user without privileges (started by root: as an
unused user id) under limits of memory, CPU time, wall time, processes, files and output. All it started dies with it.

A program has passed when its last statement has ended: leaving early, with whatever exit status, is failing. What tells
is a random token that the interpreter's frame above the program writes afterwards. This judges programs that are wrong;
one that was made to search its own interpreter for the token could still claim to be right, though not get out.
"""

import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 2**20
INSTALL = (
    "install bubblewrap 0.8 or newer ('apt-get install bubblewrap', 'dnf install bubblewrap', 'pacman -S bubblewrap'); "
    "it needs Linux 5.14 or newer with user namespaces (sysctl user.max_user_namespaces > 0, on Ubuntu an AppArmor "
    "profile for bwrap, in a container permission to unshare)"
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use. Memory is of each process; all together at most `processes` times it, and `disk`."""

    cpu_seconds: int = 5  # of each process; decides alone on a busy machine as on a quiet one
    wall_seconds: float = 20.0
    memory_bytes: int = 512 * MIB  # address space
    processes: int = 16  # and threads
    disk_bytes: int = 32 * MIB  # of /tmp and /dev/shm, each, in memory
    output_bytes: int = MIB  # of stdout and stderr together


@dataclass(frozen=True)
class Verdict:
    """`reason`: "passed", "failed" (an exception, a signal, early exit), "timeout" or "output" (too much of it)."""

    reason: str
    output: str  # the end of what it wrote, an exception's traceback included
    seconds: float

    @property
    def passed(self) -> bool:
        return self.reason == "passed"


# What starts inside: limits, then privileges, then the program. The token is written to a pipe of its own.
_LAUNCHER = """
import json, os, resource, sys, types
job = json.loads(sys.stdin.buffer.read())
limits, user = job["limits"], job["user"]
null = os.open("/dev/null", os.O_RDONLY)
os.dup2(null, 0)
os.close(null)
if user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
for kind, value in (
    ("CORE", 0),
    ("FSIZE", limits["disk_bytes"]),
    ("NOFILE", 64),
    ("AS", limits["memory_bytes"]),
    ("NPROC", limits["processes"]),
):
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (value, value))
resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"] + 1))
os.chdir("/tmp")
program = types.ModuleType("program")
sys.modules["program"] = program
def run(source, write=os.write, leave=os._exit, flush=sys.stdout.flush, report=job["report"],
        token=job.pop("token").encode()):
    code = compile(source, "<program>", "exec")
    exec(code, program.__dict__)
    try:
        flush()
    except Exception:  # it may have closed its own output, and has passed all the same
        pass
    write(report, token)
    leave(0)
run(job.pop("program"))
"""


def run_program(program: str, limits: Limits | None = None) -> Verdict:
    """Runs Python source in the sandbox. `sandbox_check.require` says first whether that contains anything.

    Raises:
      ValueError: where bubblewrap is missing or does not start, saying how to install it.
    """
    limits = limits or Limits()
    token, user = secrets.token_hex(16), _unused_user()
    start = time.monotonic()
    report, report_end = os.pipe()
    with tempfile.TemporaryFile() as job:
        said = {"program": program, "limits": asdict(limits), "user": user, "token": token, "report": report_end}
        job.write(json.dumps(said).encode())
        job.seek(0)
        try:
            process = subprocess.Popen(
                _command(limits, as_root=user is not None),
                stdin=job,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(report_end,),
                env={},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            os.close(report)
            raise ValueError(f"the sandbox does not start: {error}; {INSTALL}") from error
        finally:
            os.close(report_end)
    try:
        reason, output, token_seen = _watch(process, report, start + limits.wall_seconds, limits.output_bytes)
    finally:
        os.close(report)
        _end(process)
    if reason == "ended":
        reason = "passed" if token_seen == token.encode() else "failed"
        if process.returncode == 128 + signal.SIGXCPU:
            reason = "timeout"
    return Verdict(reason, output[-2000:].decode(errors="replace"), time.monotonic() - start)


def run_programs(programs: Sequence[str], limits: Limits | None = None) -> list[Verdict]:
    """Verdicts of many programs, in order; as many run at a time as there are CPU cores, eight at most."""
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
        return list(pool.map(lambda program: run_program(program, limits), programs))


def _unused_user() -> int | None:
    """For root: a user id that no one has, another one for each program, so that each has its own count of processes.

    (The kernel exempts root, also root seen as another user from inside a user namespace.) None for anyone else.
    """
    if os.geteuid() != 0:
        return None
    return 1_879_048_192 + secrets.randbelow(2**20)  # a range that systemd's table of user ids leaves empty


def _command(limits: Limits, *, as_root: bool) -> list[str]:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise ValueError(f"no bwrap on the path: model-written code runs in a sandbox only; {INSTALL}")
    command = [bwrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if as_root:  # mounts as root, so that it reads an interpreter in root's home too; then becomes someone else
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534"]
    command += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--dev", "/dev"]
    for folder in ("/python", "/python/bin", "/etc", "/usr"):
        command += ["--perms", "0755", "--dir", folder]
    for folder in ("/tmp", "/dev/shm"):
        command += ["--perms", "1777", "--size", str(limits.disk_bytes), "--tmpfs", folder]
    for folder in ("/lib", "/lib64", "/usr/lib", "/usr/lib64"):  # the C library
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        else:
            command += ["--ro-bind-try", folder, folder]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    prefix, name = Path(sys.base_prefix), f"python{sys.version_info.major}.{sys.version_info.minor}"
    command += ["--ro-bind", os.path.realpath(sys.executable), f"/python/bin/{name}"]
    for folder in ("lib", "lib64"):
        if (prefix / folder).is_dir():
            command += ["--ro-bind", str(prefix / folder), f"/python/{folder}"]
    for kind in ("purelib", "platlib"):  # installed packages are not the standard library
        packages = Path(sysconfig.get_path(kind, vars={"base": str(prefix), "platbase": str(prefix)}))
        if packages.is_dir() and packages.is_relative_to(prefix):
            command += ["--tmpfs", f"/python/{packages.relative_to(prefix)}"]
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]
    command += ["--setenv", "LD_LIBRARY_PATH", "/python/lib", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"]
    return [*command, "--", f"/python/bin/{name}", "-I", "-S", "-B", "-X", "utf8", "-c", _LAUNCHER]


def _watch(process: subprocess.Popen[bytes], report: int, until: float, most: int) -> tuple[str, bytes, bytes]:
    """("ended", "timeout" or "output"; what it wrote; what came through the report pipe). Never waits longer."""
    assert process.stdout is not None
    output, said = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout.fileno(), selectors.EVENT_READ, output)
        selector.register(report, selectors.EVENT_READ, said)
        while selector.get_map():
            ready = selector.select(max(0.0, until - time.monotonic()))
            if not ready:
                return "timeout", bytes(output), b""
            for key, _ in ready:
                piece = os.read(key.fd, 65536)
                key.data.extend(piece)
                if not piece:
                    selector.unregister(key.fd)
            if len(output) > most or len(said) > 64:
                return "output", bytes(output[:most]), b""
    try:  # it may have closed both pipes and go on
        process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "timeout", bytes(output), b""
    return "ended", bytes(output), bytes(said)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills bwrap; the kernel then kills the process it started, the first of its namespace, and so all in it."""
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
