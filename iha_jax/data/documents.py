"""Units of documents: what one job of a preparation reads. They are cut by the input alone, never by who reads them."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from etils import epath

from iha_jax.data.storage import files_under, local_copy
from iha_jax.data.text import as_bytes, check_split, is_text, open_builder

UNIT_BYTES = 1 << 26  # text of one unit, about: 64 MiB
HASH = "hash"  # the split of a document of a file: by a hash of its name


class Unit(Protocol):
    """Documents of one job, and the split they belong to: `HASH`, or a split's name."""

    @property
    def split(self) -> str: ...

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """(name, text) of each; raises ValueError for input that cannot be read as documents."""
        ...


@dataclass(frozen=True)
class Listing:
    """All units of an input, and a digest that names exactly this input."""

    units: tuple[Unit, ...]
    digest: str


@dataclass(frozen=True)
class WholeFiles:
    """Files that are a document each, named by their path relative to `root`."""

    root: str
    names: tuple[str, ...]
    split: str = HASH

    def documents(self) -> Iterator[tuple[str, bytes]]:
        for name in self.names:
            yield name, (epath.Path(self.root) / name).read_bytes()


@dataclass(frozen=True)
class Lines:
    """The lines of a .jsonl file that begin in bytes [start, stop): a document each, named `file@byte offset`."""

    root: str
    name: str
    start: int
    stop: int
    text_feature: str
    split: str = HASH

    def documents(self) -> Iterator[tuple[str, bytes]]:
        with (epath.Path(self.root) / self.name).open("rb") as file:
            offset = self.start
            if self.start:  # the line that the previous unit began is the previous unit's
                file.seek(self.start - 1)
                offset += len(file.readline()) - 1
            while offset < self.stop and (line := file.readline()):
                if line.strip():
                    yield f"{self.name}@{offset}", self._text(line, offset)
                offset += len(line)

    def _text(self, line: bytes, offset: int) -> bytes:
        if not is_text(line):
            return line  # not text: whoever asked leaves it out by name
        try:
            text = json.loads(line)[self.text_feature]
            return text.encode(errors="surrogatepass")  # half a surrogate pair: JSON, but no text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{epath.Path(self.root) / self.name}, line {self._line_number(offset)}: expected a JSON object with a "
                f"string {self.text_feature!r} ({error!r})"
            ) from error

    def _line_number(self, offset: int) -> int:
        with (epath.Path(self.root) / self.name).open("rb") as file:
            number, left = 1, offset
            while left and (block := file.read(min(left, 1 << 24))):
                number, left = number + block.count(b"\n"), left - len(block)
        return number


@dataclass(frozen=True)
class StoredShard:
    """One file of a split of a TFDS data set in array_record or tfrecord; documents are named `split/index`."""

    source: str
    data_dir: str
    cache_dir: str
    split: str
    filename: str
    first: int
    count: int
    text_feature: str

    def documents(self) -> Iterator[tuple[str, bytes]]:
        builder = open_builder(self.source, data_dir=self.data_dir, cache_dir=self.cache_dir)
        found = 0
        with tempfile.TemporaryDirectory(prefix="iha_jax_") as staging:
            path = local_copy(epath.Path(builder.data_path) / self.filename, staging)
            for record in _records(path, builder.info.file_format.value):
                example = builder.info.features.deserialize_example_np(record)
                yield f"{self.split}/{self.first + found}", as_bytes(example[self.text_feature])
                found += 1
        if found != self.count:
            raise ValueError(f"{self.filename}: {found} documents found, {self.count} recorded")


def _records(path: epath.Path, file_format: str) -> Iterator[bytes]:
    if file_format == "tfrecord":
        import grain

        yield from grain.experimental.TFRecordIterDataset(os.fspath(path))
        return
    from grain.sources import ArrayRecordDataSource

    source: Any = ArrayRecordDataSource(os.fspath(path))
    for i in range(len(source)):
        yield source[i]


def name_hash(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def list_files(path: epath.Path, suffix: str, text_feature: str, *, unit_bytes: int = UNIT_BYTES) -> Listing:
    """The documents of one file or of every file with `suffix` under a folder (a bucket's too).

    A file is a document; of a `.jsonl` file, every line is. Whole files come in the order of a hash of their names, so
    that neighbors in a row of tokens are strangers; lines keep theirs.

    Raises:
      ValueError: when there is no such path, or no such file under it.
    """
    if not path.exists():
        raise ValueError(f"--input={path}: no such file or folder")
    root = path if path.is_dir() else path.parent
    found = {name: fact for name, fact in files_under(path).items() if name.endswith(suffix)} if path.is_dir() else {}
    if not path.is_dir():
        stat = path.stat()
        found = {path.name: (int(stat.length), str(stat.mtime))}
    if not found:
        raise ValueError(f"--input={path}: no file" + (f" with suffix {suffix!r}" if suffix else ""))
    units: list[Unit] = []
    batch: list[str] = []
    size = 0
    for name in sorted((n for n in found if not n.endswith(".jsonl")), key=name_hash):
        batch, size = [*batch, name], size + found[name][0]
        if size >= unit_bytes:
            units.append(WholeFiles(os.fspath(root), tuple(batch)))
            batch, size = [], 0
    if batch:
        units.append(WholeFiles(os.fspath(root), tuple(batch)))
    for name in sorted(n for n in found if n.endswith(".jsonl")):
        end = max(found[name][0], 1)
        units += [
            Lines(os.fspath(root), name, start, min(start + unit_bytes, end), text_feature)
            for start in range(0, end, unit_bytes)
        ]
    return Listing(tuple(units), _digest(["files", text_feature, unit_bytes, sorted(found.items())]))


def list_stored(source: str, splits: list[str], *, data_dir: str, cache_dir: str, text_feature: str) -> Listing:
    """The shards of these splits of a TFDS data set: "stdlib", a prepared directory, or a name. Raises ValueError."""
    builder = open_builder(source, data_dir=data_dir, cache_dir=cache_dir)
    file_format = builder.info.file_format.value
    if file_format not in ("array_record", "tfrecord"):
        raise ValueError(f"data source {source!r} is stored as {file_format}; expected array_record or tfrecord")
    units: list[Unit] = []
    for split in splits:
        check_split(builder, source, split, text_feature)
        first = 0
        info = builder.info.splits[split]
        for path, count in zip(info.filepaths, info.shard_lengths, strict=True):
            if count:
                name = epath.Path(path).name
                units.append(StoredShard(source, data_dir, cache_dir, split, name, first, count, text_feature))
            first += count
    return Listing(tuple(units), _digest(["tfds", os.fspath(builder.data_path), text_feature, *map(str, units)]))


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
