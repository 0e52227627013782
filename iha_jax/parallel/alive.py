"""Noticing at once that a process of this run is gone: each holds a connection to process 0, which breaks when either
end of it dies, whatever its threads wait for. The heartbeats of JAX's coordination service need a minute for that."""

import contextlib
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

_KEY, _GOODBYE = "iha_jax/alive", "goodbye\n"
_SECONDS_TO_CONNECT = 10


def hold(store: Any, index: int, host: str, lost: Callable[[int], None]) -> Callable[[], None]:
    """Connects this process, `index`, to process 0 on `host`. In a thread, `lost` is called with the index of a process
    that has gone without goodbye: in process 0 any other, elsewhere process 0. Returns what says goodbye.

    Where no connection can be made, says so and leaves it to the heartbeats.
    """
    return _serve(store, lost) if index == 0 else _join(store, index, host, lost)


def _serve(store: Any, lost: Callable[[int], None]) -> Callable[[], None]:
    both = socket.has_dualstack_ipv6()
    server = socket.create_server(("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    token = secrets.token_hex(16)  # strangers may come and go
    store.key_value_set(_KEY, f"{server.getsockname()[1]} {token}")
    joined: list[socket.socket] = []

    def look_after(connection: socket.socket) -> None:
        said, _, index = _line(connection).strip().partition(" ")
        if said == token:
            joined.append(connection)
            if _line(connection) != _GOODBYE:
                lost(int(index))

    def accept() -> None:
        while True:
            _in_thread(look_after, server.accept()[0])

    _in_thread(accept)

    def leave() -> None:
        for connection in joined:
            _say(connection, _GOODBYE)

    return leave


def _join(store: Any, index: int, host: str, lost: Callable[[int], None]) -> Callable[[], None]:
    port, token = store.blocking_key_value_get(_KEY, 60_000).split()
    try:
        connection = socket.create_connection((host, int(port)), timeout=_SECONDS_TO_CONNECT)
    except OSError as error:
        print(
            f"process {index} cannot reach port {port} of {host} ({error}): a dead process will be noticed by its "
            f"missing heartbeats alone, after a minute",
            file=sys.stderr,
            flush=True,
        )
        return lambda: None
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    _say(connection, f"{token} {index}\n")

    def look_after() -> None:
        if _line(connection) != _GOODBYE:
            lost(0)

    _in_thread(look_after)
    return lambda: _say(connection, _GOODBYE)


def _line(connection: socket.socket) -> str:
    """What is said next; empty when the other end is gone."""
    found = b""
    with contextlib.suppress(OSError):
        while not found.endswith(b"\n") and len(found) < 100 and (byte := connection.recv(1)):
            found += byte
    return found.decode(errors="replace")


def _say(connection: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(text.encode())


def _in_thread(function: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()
