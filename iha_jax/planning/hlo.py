"""Collectives of a compiled program, each counted as often as it runs, from the text of its optimized HLO.

A scan over layers is a `while` loop, and its body's collectives run once an iteration. The compiler writes the number
of iterations beside most loops (`known_trip_count`); else it is the constant that the loop's condition compares with.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]\d*[a-z\d]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Instruction:
    """A line of a computation: its name, result type, operation, and the rest of the line, operands first."""

    name: str
    result: str
    operation: str
    rest: str


@dataclass(frozen=True)
class Collective:
    """One collective of the program. `result_bytes`: of its result on one device, one time; `times`: runs a step;
    `groups`: the devices of the slice that talk to one another, as places in the program's device list (empty: all of
    them); `between_slices`: over the data-center network instead, each device with its like in the other slices."""

    kind: str
    result_bytes: float
    times: int
    groups: tuple[tuple[int, ...], ...]
    name: str
    between_slices: bool = False

    def moved_bytes(self, members: int) -> float:
        """Bytes that a device receives in one run by a bandwidth-optimal algorithm, of R result bytes and g members.

        all-gather, all-to-all: `R (g - 1) / g`; reduce-scatter: `R (g - 1)`; all-reduce, the two after each other:
        `2 R (g - 1) / g`; permute and broadcast: R.
        """
        if members < 2 and "permute" not in self.kind:
            return 0.0
        share = (members - 1) / members
        factor = {"all-reduce": 2 * share, "reduce-scatter": members - 1.0}
        factor |= dict.fromkeys(("all-gather", "all-to-all", "ragged-all-to-all"), share)
        return self.result_bytes * factor.get(self.kind, 1.0)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(the instructions of each computation, the name of the entry computation) of a module's text.

    Raises:
      ValueError: for text without an entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            found = _COMPUTATION.match(line)
            if found:
                current = computations.setdefault(found[2], [])
                entry = found[2] if found[1] else entry
        elif current is not None:
            found = _INSTRUCTION.match(line)
            if found:
                current.append(Instruction(*found.groups()))
    if not entry:
        raise ValueError("no entry computation in the program's text")
    return computations, entry


def shape_bytes(text: str) -> float:
    """Bytes of all arrays in a type such as `(bf16[8,128]{1,0}, f32[])`."""
    total = 0.0
    for kind, dimensions in _SHAPE.findall(text):
        digits = re.match(r"[a-z]+(\d+)", kind)
        bits = _BITS.get(kind) or (int(digits[1]) if digits else 8)
        total += math.prod(int(size) for size in dimensions.split(",") if size) * bits / 8
    return total


def times_run(computations: dict[str, list[Instruction]], entry: str) -> dict[str, int]:
    """How often each computation runs when the program runs once; every branch of a conditional counts as taken."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for instruction in computations.get(name, ()):
            trips = _trip_count(instruction, computations) if instruction.operation == "while" else 1
            for called in _called(instruction):
                visit(called, count * trips)

    visit(entry, 1)
    return dict(times)


def collectives(text: str, devices: int) -> list[Collective]:
    """Every collective of an optimized module for `devices` devices, the slowest to run first.

    TPU's compiler spreads one over the operations beside it: a first piece, many between, some in loops of their own,
    and a last. All pieces have one channel, and the collective runs as often as the rarest of them.
    """
    computations, entry = parse(text)
    times = times_run(computations, entry)
    found: dict[str, Collective] = {}
    for computation, count in times.items():
        for instruction in computations.get(computation, ()):
            collective = _collective(instruction, computation, count, devices)
            if collective is None:
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = f"{collective.kind} {channel[1]}" if channel else instruction.name
            if key not in found or count < found[key].times:
                found[key] = collective
    return sorted(found.values(), key=lambda one: -one.times * one.result_bytes)


def _collective(instruction: Instruction, computation: str, count: int, devices: int) -> Collective | None:
    kind = instruction.operation.removesuffix("-start")
    between = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
    if between and kind == "recv":  # TPU's compiler writes what crosses slices as a send and a receive
        kind = between[1].lower().replace("_", "-")
        result = shape_bytes(instruction.result.split(", u32[]")[0])
        return Collective(kind, result, count, (), instruction.name, between_slices=True)
    if kind not in KINDS:
        return None
    groups = _groups(instruction.rest, devices)
    size = len(groups[0]) if groups else devices
    result = _result_bytes(instruction, kind, size)
    # TPU's compiler writes a reduce-scatter as a fusion named so, of an all-reduce and a slice.
    if computation.startswith("all-reduce-scatter") and kind == "all-reduce":
        kind, result = "reduce-scatter", result / size
    return Collective(kind, result, count, groups, instruction.name)


def _called(instruction: Instruction) -> Iterator[str]:
    yield from _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        yield from (name.strip().lstrip("%") for name in branches.split(","))


def _trip_count(instruction: Instruction, computations: dict[str, list[Instruction]]) -> int:
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', instruction.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", instruction.rest)
    constants = []
    for line in computations.get(condition[1], ()) if condition else ():
        found = re.match(r"(\d+)\)", line.rest)
        if line.operation == "constant" and found:
            constants.append(int(found[1]))
    return max(constants, default=1)


def _result_bytes(instruction: Instruction, kind: str, members: int) -> float:
    """The start of an asynchronous collective has its operand in its result too."""
    total = shape_bytes(instruction.result)
    if not instruction.operation.endswith("-start"):
        return total
    if kind == "all-gather":
        return total * members / (members + 1)
    if kind == "reduce-scatter":
        return total / (members + 1)
    if kind == "all-reduce":
        return total
    scalars = sum(4 for _, dimensions in _SHAPE.findall(instruction.result) if not dimensions)
    return (total - scalars) / 2


def _groups(rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", rest)
    if pairs:
        return _braces(pairs[1])
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
    if listed:
        return _braces(listed[1])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, source = (tuple(map(int, part.split(","))) for part in iota.groups()[:2])
        order = tuple(map(int, iota[3].split(","))) if iota[3] else tuple(range(len(source)))
        return _rows(_transposed(source, order), shape[-1])
    mesh = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest)
    return _mesh_groups(mesh[1], mesh[2]) if mesh else ()


def _mesh_groups(mesh: str, axes: str) -> tuple[tuple[int, ...], ...]:
    """Groups along `axes` ("'a','b':(2)4": of b, the 4 after the first 2 parts) of a mesh ("'a'=8,'b'=16")."""
    sizes, along = [], []
    chosen = {name: (int(before or 1), int(size or 0)) for name, before, size in _AXIS.findall(axes)}
    for name, size in re.findall(r"'([^']+)'=(\d+)", mesh):
        before, part = chosen.get(name, (1, 0))
        part = (part or int(size)) if name in chosen else 1
        along += [len(sizes) + 1]
        sizes += [before, part, int(size) // (before * part)]
    others = [axis for axis in range(len(sizes)) if axis not in along]
    return _rows(_transposed(sizes, [*others, *along]), math.prod(sizes[axis] for axis in along))


def _rows(numbers: Sequence[int], size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(numbers[start : start + size]) for start in range(0, len(numbers), size))


def _transposed(source: Sequence[int], order: Sequence[int]) -> list[int]:
    """0, 1, ... laid out as `source`, its dimensions then reordered, and read row by row."""
    strides = [math.prod(source[i + 1 :]) for i in range(len(source))]
    numbers = [0]
    for axis in order:
        numbers = [number + i * strides[axis] for number in numbers for i in range(source[axis])]
    return numbers


def _braces(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text))
