"""What the processes of one run do together: agree before they compile, take turns, and end when one of them fails.

They talk through the key-value store of JAX's coordination service, which process 0 serves: it works before any device
is touched, and a process that comes late or never cannot be mistaken for another exchange, as in a collective.

A process alone does what each function says of one process, at no cost.
"""

import atexit
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import jax

from iha_jax.parallel.alive import hold

T = TypeVar("T")
_NEWS = "iha_jax/news/"  # where a thread of every process looks once a second
_FAILED = f"{_NEWS}failed"
_SECONDS_BETWEEN_NOTES, _SECONDS_BETWEEN_LOOKS = 60, 1.0
_MAX_DIFFERENCES = 20


class Disagreement(ValueError):  # noqa: N818  a disagreement is what it is
    """Some process refused, or found other facts than the rest. Raised in every process with the same message."""


@dataclasses.dataclass
class _Company:
    """The processes of this run, seen from one of them."""

    store: Any
    index: int
    count: int
    hosts: list[str]
    exchanges: Any = dataclasses.field(default_factory=itertools.count)
    said: str = ""  # to the others, of why they must end
    leaving: threading.Event = dataclasses.field(default_factory=threading.Event)
    readers: list[Callable[[dict[str, str]], None]] = dataclasses.field(default_factory=list)

    def name(self, index: int) -> str:
        return f"process {index} ({self.hosts[index]})" if self.hosts else f"process {index}"

    def read(self, key: str, writer: int) -> str:
        """Waits for as long as the writer lives; the coordination service ends this process when it does not."""
        while True:
            try:
                return self.store.blocking_key_value_get(key, _SECONDS_BETWEEN_NOTES * 1000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                print(f"{self.name(self.index)} still waits for {self.name(writer)}", file=sys.stderr, flush=True)

    def conclude(self, said: Any, judge: Callable[[list[Any]], Any]) -> Any:
        """Process 0's `judge` of what all processes said (JSON values, in their order), in every process."""
        key = f"iha_jax/{next(self.exchanges)}"
        self.store.key_value_set(f"{key}/{self.index}", json.dumps(said))
        if self.index == 0:
            conclusion = json.dumps(judge([json.loads(self.read(f"{key}/{i}", i)) for i in range(self.count)]))
            self.store.key_value_set(f"{key}/conclusion", conclusion)
            return json.loads(conclusion)
        return json.loads(self.read(f"{key}/conclusion", 0))


_company: _Company | None = None  # None: a process alone


def begin() -> None:
    """After `jax.distributed.initialize`: learns the hosts' names, and sees to it that no process outlives another's
    failure."""
    global _company
    from jax._src import distributed  # the store has no public name; Orbax reaches it in this way too

    state = distributed.global_state
    assert state.coordinator_address is not None
    company = _company = _Company(state.client, state.process_id, state.num_processes, [])
    sys.excepthook = _fail
    watcher = threading.Thread(target=_watch, args=(company,), daemon=True)
    watcher.start()
    company.hosts = company.conclude(socket.gethostname(), lambda names: names)

    def lost(index: int) -> None:
        if not company.leaving.wait(2 * _SECONDS_BETWEEN_LOOKS):  # if it has said why, the watcher tells
            _leave(f"{company.name(index)} is gone without a word")

    host = state.coordinator_address.rpartition(":")[0].strip("[]")
    goodbye = hold(state.client, state.process_id, host, lost)
    atexit.register(lambda: (company.leaving.set(), goodbye(), watcher.join()))


def agree(function: Callable[[], T], facts: Callable[[T], Mapping[str, Any]] | None = None) -> T:
    """`function()`, when it succeeded in every process and `facts(result)` are the same in all of them.

    Every process calls `agree` in the same order. One process alone: `function()`.

    Raises:
      ValueError: what the function raised, in one process alone.
      Disagreement: in every process, saying which refused and why, or which facts differ and where.
    """
    if _company is None:
        return function()
    result: Any = None
    try:
        result = function()
        said = {"refused": None, "facts": dict(facts(result)) if facts else {}}
    except ValueError as error:
        said = {"refused": str(error), "facts": {}}
    if problem := _company.conclude(said, _problem):
        raise Disagreement(problem)
    return result


def in_turns(function: Callable[[], T], facts: Callable[[T], Mapping[str, Any]] | None = None) -> T:
    """`agree`, but process 0 goes first, then one process of each other host, then the rest.

    For what is made once and found by whoever comes later: on a shared disk process 0 makes it for all, on separate
    disks one process of each host does. Raises as `agree` does.
    """
    if _company is None:
        return function()
    hosts, here = _company.hosts, _company.index
    turns = [0 if i == 0 else 1 if hosts.index(host) == i else 2 for i, host in enumerate(hosts)]
    result: Any = None
    for turn in sorted(set(turns)):
        result = agree(lambda: function() if turns[here] == turn else result)
    return agree(lambda: result, facts)


def of_first(value: T) -> T:
    """Process 0's value, in every process; JSON turns tuples into lists."""
    return value if _company is None else _company.conclude(value, lambda said: said[0])


def of_all(value: T) -> list[T]:
    """The values of all processes, in their order, in every process; JSON turns tuples into lists."""
    return [value] if _company is None else _company.conclude(value, lambda said: said)


def publish(name: str, value: str) -> None:
    """Makes `value` news for all processes, this one too, under a name that nobody has published before."""
    assert _company is not None
    _company.store.key_value_set(f"{_NEWS}{name}", value)


def on_news(reader: Callable[[dict[str, str]], None]) -> None:
    """A thread calls `reader` about once a second, with the values of all news by name; of a process alone, never."""
    if _company is not None:
        _company.readers.append(reader)


def is_first() -> bool:
    """Whether this is process 0, which writes and prints for all. Touches no device."""
    return _company is None or _company.index == 0


def process_table() -> str:
    """Host, number, kind and ids of the devices of every process, one line each."""
    hosts = _company.hosts if _company else [socket.gethostname()]
    lines = []
    for i, host in enumerate(hosts):
        devices = [device for device in jax.devices() if device.process_index == i]
        kinds = ", ".join(dict.fromkeys(device.device_kind for device in devices))
        lines.append(f"process {i}  {host}  {len(devices)} x {kinds}, ids {', '.join(str(d.id) for d in devices)}")
    return "\n".join(lines)


def _problem(said: list[dict[str, Any]]) -> str:
    """What stands against going on; nothing when all agree."""
    assert _company is not None
    refusals: dict[str, list[int]] = {}
    for i, one in enumerate(said):
        if one["refused"] is not None:
            refusals.setdefault(one["refused"], []).append(i)
    if refusals:
        if list(refusals.values()) == [list(range(len(said)))]:
            return next(iter(refusals))  # the same everywhere: no need to say where
        return "\n".join(f"{_names(where)}: {why}" for why, where in refusals.items())
    differences = []
    for fact in sorted(set().union(*(one["facts"] for one in said))):
        found: dict[str, list[int]] = {}
        for i, one in enumerate(said):
            found.setdefault(repr(one["facts"].get(fact)), []).append(i)
        if len(found) > 1:
            differences.append(f"  - {fact}: " + "; ".join(f"{x} in {_names(i)}" for x, i in found.items()))
    if not differences:
        return ""
    more = len(differences) - _MAX_DIFFERENCES
    shown = differences[:_MAX_DIFFERENCES] + ([f"  - and {more} more"] if more > 0 else [])
    return "the processes of this run differ; all need the same command, code and data:\n" + "\n".join(shown)


def _names(indices: list[int]) -> str:
    assert _company is not None
    named = [_company.name(i) for i in indices[:3]]
    return ", ".join(named) + (f" and {len(indices) - 3} more" if len(indices) > 3 else "")


def _fail(kind: type[BaseException], error: BaseException, trace: Any) -> NoReturn:
    """The excepthook: an ordinary exit would wait for the other processes, and they for this one."""
    sys.__excepthook__(kind, error, trace)
    assert _company is not None
    _leave(f"{_company.name(_company.index)}: {kind.__name__}: {error}", quiet=True)


def _leave(text: str, quiet: bool = False) -> NoReturn:
    """Ends this process, and through `_watch` all others, which print `text`."""
    assert _company is not None
    _company.said = text
    if not quiet:
        print(f"ended, because another process failed: {text}", file=sys.stderr, flush=True)
    # In a thread: where process 0 is gone, setting a key can take minutes.
    thread = threading.Thread(target=_publish_failure, args=(_company.store, text), daemon=True)
    thread.start()
    thread.join(2)
    if _company.index == 0:
        time.sleep(2 * _SECONDS_BETWEEN_LOOKS)  # it serves the store: the others must have looked
    end(1)


def _publish_failure(store: Any, text: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process failed first, or process 0 is gone
        store.key_value_set(_FAILED, text)


def _watch(company: _Company) -> None:
    while not company.leaving.wait(_SECONDS_BETWEEN_LOOKS):
        try:
            news = dict(company.store.key_value_dir_get(_NEWS))
            failed = news.get(_FAILED, company.said)
            if failed != company.said:  # else it waits for the others to look
                print(f"ended, because another process failed: {failed}", file=sys.stderr, flush=True)
                end(1)
            for reader in company.readers:
                reader({key.removeprefix(_NEWS): value for key, value in news.items()})
        except jax.errors.JaxRuntimeError:
            return  # process 0 is gone; the runtime ends this process


def end(code: int) -> NoReturn:
    """Ends this process at once with exit code `code`: an ordinary exit would wait for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():  # loader processes would stay behind
        child.kill()
    os._exit(code)
