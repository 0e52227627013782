"""Starting as one of several processes: their flags, what a cluster says of itself, and the connection between them.

Importing this takes no jax: --help should not wait seconds for it.
"""

import argparse
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

HEARTBEAT_SECONDS, SHUTDOWN_SECONDS = 60, 120
_NAMED = ("coordinator_address", "process_count", "process_index")
_OF_THIS_PROCESS = ("initialization_timeout", "single_process")


class Place(NamedTuple):
    """One process among all of a run; `local_device_ids` None: every device of this machine is its own."""

    coordinator_address: str
    process_count: int
    process_index: int
    local_device_ids: list[int] | None = None


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that can run as several processes."""
    group = parser.add_argument_group(
        "several processes",
        "The same command on every host. TPU pods, SLURM, Open MPI and Kubernetes are detected; elsewhere give the "
        "first three of these.",
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--process_count", type=int, metavar="N", help="how many processes there are")
    group.add_argument("--process_index", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--initialization_timeout", type=int, default=600, metavar="SECONDS", help="wait so long for all; default: 600"
    )
    group.add_argument("--single_process", action="store_true", help="one process alone, whatever cluster is detected")


def common_flags(flags: argparse.Namespace) -> dict[str, Any]:
    """The other flags of a command: those that must be the same in all processes."""
    return {f"--{name}": x for name, x in vars(flags).items() if name not in (*_NAMED, *_OF_THIS_PROCESS)}


def start_processes(flags: argparse.Namespace) -> None:
    """Joins the processes of this run, before anything touches a device. One process alone starts nothing.

    Ends the process with a message and exit code 1 when the others cannot be reached in `--initialization_timeout`.

    Raises:
      ValueError: for flags that are incomplete or contradict each other, or a cluster that does not say enough.
    """
    place = place_from_flags(flags)
    if place is None and not flags.single_process:
        place = detected_place(flags.initialization_timeout)
    if place is not None and place.process_count > 1:
        connect(place, flags.initialization_timeout)


def connect(place: Place, timeout: int) -> None:
    """Joins the others as `place` says, or ends the process with a message and exit code 1 after `timeout` seconds.

    Raises:
      ValueError: in process 0, when the port is taken.
    """
    import jax

    from iha_jax.parallel.processes import begin

    if place.process_index == 0:
        _check_port(place.coordinator_address)
    # Its handler of SIGTERM would take the signals that `iha_jax.training.preemption` waits for, and all before it.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX ends the process by itself when it cannot connect, and its message names no address.
    timer = threading.Timer(timeout, _give_up, [place, timeout])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            place.coordinator_address,
            place.process_count,
            place.process_index,
            local_device_ids=place.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    finally:
        timer.cancel()
    begin()


def place_from_flags(flags: argparse.Namespace) -> Place | None:
    """What the flags say; None when they say nothing. Raises ValueError with everything that is wrong with them."""
    given = {name: getattr(flags, name) for name in _NAMED if getattr(flags, name) is not None}
    shown = " ".join(f"--{name}={value}" for name, value in given.items())
    problems = []
    if flags.initialization_timeout < 1:
        problems.append(f"--initialization_timeout={flags.initialization_timeout}: expected at least 1 second")
    if given and flags.single_process:
        problems.append(f"--single_process {shown}: contradict each other; leave out one or the other")
    elif given and len(given) < len(_NAMED):
        missing = " and ".join(f"--{name}" for name in _NAMED if name not in given)
        problems.append(f"{shown}: {missing} missing; give all three, or none where a cluster is detected")
    count, index, address = (given.get(name) for name in ("process_count", "process_index", "coordinator_address"))
    if count is not None and count < 1:
        problems.append(f"--process_count={count}: expected at least 1")
    elif index is not None and not 0 <= index < (count or index + 1):
        problems.append(f"--process_index={index}: expected 0 to {(count or 1) - 1}")
    if address is not None and not _is_address(address):
        problems.append(f"--coordinator_address={address}: expected HOST:PORT, such as 10.0.0.1:8476")
    if problems:
        raise ValueError("\n".join(problems))
    return Place(**given) if given else None


def _is_address(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and "/" not in host and port.isdecimal() and 0 < int(port) < 1 << 16


def detected_place(timeout: int) -> Place | None:
    """What the cluster says that `jax.distributed.initialize()` would find; None outside one, or alone in it.

    JAX gives each of SLURM's or Open MPI's processes one GPU. Here one process alone on its machine has all of them.

    Raises:
      ValueError: when a cluster is there but does not say how to join it.
    """
    from jax._src.clusters import ClusterEnv  # there is no public way to ask without starting the service

    clusters = (cluster for cluster in ClusterEnv._cluster_types if not cluster.opt_in_only_method)
    found: Any = next((cluster for cluster in clusters if cluster.is_env_present()), None)
    if found is None:
        return None
    try:
        count = int(found.get_process_count())
        if count == 1:
            return None
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = found.get_coordinator_address(timeout_secs=timeout, override_coordinator_port=port)
        local = found.get_local_process_id()
        return Place(address, count, int(found.get_process_id()), None if _owns_machine(local) else [local])
    except Exception as error:
        raise ValueError(
            f"this looks like {found.__name__}, but it does not say how to join it: {error}; give "
            f"{', '.join(f'--{name}' for name in _NAMED)}, or --single_process"
        ) from error


def _owns_machine(local_index: int | None) -> bool:
    said = os.environ.get
    alone = said("SLURM_STEP_NUM_NODES", "") == said("SLURM_NTASKS") or said("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return local_index is None or alone or said("JAX_LOCAL_DEVICE_IDS") is not None  # jax reads the last by itself


def _check_port(address: str) -> None:
    """JAX, which listens on all of this host's addresses, crashes without a word when the port is taken."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    port = int(address.rpartition(":")[2])
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        raise ValueError(f"coordinator {address}: port {port} of this host cannot be used: {error}") from error


def _give_up(place: Place, seconds: int, end: Callable[[int], Any] = os._exit) -> None:
    host, _, port = place.coordinator_address.rpartition(":")
    listening = True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError as error:
        listening, reason = False, str(error)
    why = (
        f"process 0 listens there, but not all {place.process_count} processes have come"
        if listening
        else f"nothing listens there ({reason}): is process 0 running, and is the port open to this host?"
    )
    print(
        f"process {place.process_index} of {place.process_count} gave up after {seconds} s: coordinator "
        f"{place.coordinator_address}: {why}",
        file=sys.stderr,
        flush=True,
    )
    end(1)
