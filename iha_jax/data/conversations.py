"""Conversations from JSONL files, and their rows: whole conversations beside one another, never cut in two.

A source is "chat:PATH". PATH is a folder with `<split>.jsonl`, or one file, of which about 5 % are the validation split
by a hash of each line. Every line is a conversation in one of the layouts of `chat.read_conversation`.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from iha_jax.data.chat import RENDERING, read_conversation, tokenize
from iha_jax.data.jobs import Facts
from iha_jax.data.storage import check_library, files_in
from iha_jax.data.tokenizers import Tokenizer

PREFIX = "chat:"
VALIDATION_PERCENT = 5
SPLITS = ("train", "validation")
_OPEN_ROWS = 64  # rows of a shard that are being filled at once


def is_chat(source: str) -> bool:
    return source.startswith(PREFIX)


class Conversations:
    """A `TextSource` whose documents are JSON lists of checked messages, the same for both layouts.

    Raises:
      ValueError: for a path or split that does not exist; when read, for a line that is no conversation, naming file
        and line.
    """

    def __init__(self, source: str, split: str):
        path = epath.Path(source.removeprefix(PREFIX)).expanduser()
        check_library(path)
        self._hashed = "" if path.is_dir() else split
        self._file = path / f"{split}.jsonl" if path.is_dir() else path
        if not self._file.exists():
            found = ", ".join(sorted(name for name in files_in(path) if name.endswith(".jsonl")))
            hint = f"there are {found}" if found else "expected a .jsonl file, or a folder with <split>.jsonl"
            raise ValueError(f"data source {source!r}, split {split!r}: no file {self._file}; {hint}")
        if self._hashed and split not in SPLITS:
            raise ValueError(f"data source {source!r} has no split {split!r}; one file has {' and '.join(SPLITS)}")
        self._fact = files_in(self._file.parent)[self._file.name]
        facts = [RENDERING, os.fspath(self._file), *self._fact, self._hashed]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        if not len(self):
            hint = "; use a folder with train.jsonl and validation.jsonl" if self._hashed else ""
            raise ValueError(f"data source {source!r}, split {split!r}: holds no conversation{hint}")

    @property
    def _lines(self) -> Sequence[tuple[int, int]]:
        return _index(os.fspath(self._file), self._fact, self._hashed)

    def __len__(self) -> int:
        return len(self._lines)

    def files(self, start: int, stop: int) -> set[str]:
        return set()  # none is copied: lines are read where they are

    def read(self, start: int, stop: int, staging: str) -> Iterator[bytes]:
        with self._file.open("rb") as file:
            for number, offset in self._lines[start:stop]:
                file.seek(offset)
                try:
                    yield json.dumps(read_conversation(file.readline())).encode()
                except ValueError as error:
                    raise ValueError(f"{self._file}, line {number}: {error}") from error


@functools.lru_cache(maxsize=8)
def _index(path: str, fact: tuple[int, str], split: str) -> list[tuple[int, int]]:
    """(line number, byte offset) of every line that is not blank; of a split, where that goes by hash."""
    found, offset = [], 0
    with epath.Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if (text := line.strip()) and split in ("", _split_of(text)):
                found.append((number, offset))
            offset += len(line)
    return found


def _split_of(line: bytes) -> str:
    return "validation" if int(hashlib.sha256(line).hexdigest(), 16) % 100 < VALIDATION_PERCENT else "train"


def conversation_rows(
    batches: Iterator[list[bytes]], tokenizer: Tokenizer, dtype: np.dtype, facts: Facts
) -> Iterator[np.ndarray]:
    """Rows (records of `dtype`, some at a time) that hold whole conversations.

    One that is longer than a row is cut at its end, `truncated`; where nothing of the assistant is left then, it is
    `left_out`. A conversation goes to the fullest of the open rows that has room for it. Counts are added to `facts`.
    """
    length = dtype["tokens"].shape[0]
    open_rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
    room: list[int] = []
    for batch in batches:
        for tokens, counted in tokenize(batch, tokenizer):
            if not counted[:length].any():
                facts["left_out"] += 1
                continue
            facts["truncated"] += tokens.size > length
            facts["truncated_tokens"] += max(0, tokens.size - length)
            tokens, counted = tokens[:length], counted[:length]
            _count(tokens, tokenizer, facts)
            fitting = [i for i, free in enumerate(room) if free >= tokens.size]
            if fitting:
                chosen = min(fitting, key=room.__getitem__)
            else:
                if len(room) == _OPEN_ROWS:
                    fullest = room.index(min(room))
                    room.pop(fullest)
                    yield _record(open_rows.pop(fullest), dtype)
                open_rows.append([])
                room.append(length)
                chosen = len(room) - 1
            open_rows[chosen].append((tokens, counted))
            room[chosen] -= tokens.size
    for parts in open_rows:
        yield _record(parts, dtype)


def _count(tokens: np.ndarray, tokenizer: Tokenizer, facts: Facts) -> None:
    text_bytes = int(tokenizer.byte_lengths[tokens].sum())
    facts["num_documents"] += 1
    facts["num_tokens"] += tokens.size
    facts["num_bytes"] += text_bytes
    facts["num_token_bytes"] += text_bytes
    facts["max_token_id"] = max(facts["max_token_id"], int(tokens.max()))


def _record(parts: list[tuple[np.ndarray, np.ndarray]], dtype: np.dtype) -> np.ndarray:
    row, at = np.zeros(1, dtype), 0
    for segment, (tokens, counted) in enumerate(parts, 1):
        here = slice(at, at + tokens.size)
        row["tokens"][0, here], row["counted"][0, here], row["segment_ids"][0, here] = tokens, counted, segment
        at += tokens.size
    return row
