"""Packed rows, read: token ids and segment ids of one length, by index, from a local disk or a bucket.

A row is a record of fixed size, so that row i of a shard is a slice of its file: a memory map locally, one range
request from a bucket. `rows.json`, written last, describes the shards; see `packing.py` for what is in a row.
"""

import bisect
import hashlib
import itertools
import json
from typing import Any, Protocol

import numpy as np
from etils import epath

from iha_jax.data.packing import FORMAT, METADATA, Reader, checksums, pack, row_dtype, shard_name
from iha_jax.data.storage import files_in, is_local, read_range
from iha_jax.data.text import default_cache, open_text_source
from iha_jax.data.tokenizers import Tokenizer


class RowSource(Protocol):
    """Rows of tokens by index, and what was left out to make them; stored ones (`Rows`) or made when asked for."""

    is_local: bool
    digest: str
    corpus_digest: str
    context_length: int
    num_documents: int
    num_tokens: int
    left_out: int
    truncated: int
    truncated_tokens: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class Rows:
    """Random access to packed rows. `rows[i]` is `{"tokens": int32 [N + 1], "segment_ids": int32 [N + 1]}`, and of
    conversations also `"counted"`: 1 for the tokens that count in the loss.

    Reading a row raises ValueError, naming file and row, when it is not what was written: a token id outside the
    vocabulary never reaches a model.
    """

    def __init__(self, directory: epath.Path, metadata: dict[str, Any]):
        self._directory, self._metadata = directory, metadata
        self.digest: str = metadata["digest"]
        self.corpus_digest: str = metadata["corpus_digest"]
        self.context_length: int = metadata["context_length"]
        self.num_documents: int = metadata["num_documents"]
        self.num_tokens: int = metadata["num_tokens"]
        self.num_bytes: int = metadata["num_bytes"]
        self.max_token_id: int = metadata["max_token_id"]
        self.left_out: int = metadata["left_out"]
        self.truncated: int = metadata.get("truncated", 0)
        self.truncated_tokens: int = metadata.get("truncated_tokens", 0)
        self.is_local = is_local(directory)
        self._dtype = _dtype(metadata)
        self._fields = [name for name in self._dtype.names or () if name != "crc32"]
        self._ends = list(itertools.accumulate(metadata["shard_rows"]))
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = range(len(self))[int(index)]
        shard = bisect.bisect_right(self._ends, index)
        at = index - (self._ends[shard - 1] if shard else 0)
        (row,) = records = self._record(shard, at)
        if checksums(records) != [row["crc32"]]:
            raise ValueError(
                f"{self._directory / shard_name(shard)}: row {at} was altered since it was written. Delete the "
                f"directory to pack again"
            )
        return {name: row[name].astype(np.int32) for name in self._fields}

    def _record(self, shard: int, index: int) -> np.ndarray:
        """An array of one record."""
        path = self._directory / shard_name(shard)
        if not self.is_local:
            size = self._dtype.itemsize
            return np.frombuffer(read_range(path, index * size, (index + 1) * size), self._dtype)
        if shard not in self._maps:  # opened where it is used: each loader process has its own
            self._maps[shard] = np.memmap(path, self._dtype, mode="r")
        return self._maps[shard][index : index + 1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}


def _dtype(metadata: dict[str, Any]) -> np.dtype:
    return row_dtype(metadata["vocab_size"], metadata["context_length"], counted=metadata.get("counted", False))


def open_rows(
    *,
    source: str,
    split: str,
    tokenizer: Tokenizer,
    context_length: int,
    data_dir: str = "",
    cache_dir: str = "",
    text_feature: str = "text",
    workers: int = 1,
) -> Rows:
    """The packed rows of one split of a source: read from the cache, packed into it on first use.

    Raises:
      ValueError: for sources that cannot be used (see `open_text_source`), no valid text, token ids outside the
        vocabulary, or cached rows that do not match what is asked or were altered.
    """
    if context_length < 1:
        raise ValueError(f"context_length = {context_length}: expected at least 1")
    documents = open_text_source(source, split, data_dir=data_dir, cache_dir=cache_dir, text_feature=text_feature)
    key = f"{FORMAT}:{documents.fingerprint}:{tokenizer.digest}:{context_length}"
    directory = default_cache(cache_dir) / "rows" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not (directory / METADATA).exists():
        reader = Reader(source, split, data_dir, cache_dir, text_feature)
        pack(documents, reader, tokenizer, context_length, directory, workers=workers)
    return read_rows(directory, tokenizer, context_length)


def read_rows(directory: epath.Path, tokenizer: Tokenizer, context_length: int) -> Rows:
    """Rows that were packed before, checked against what is asked. Raises ValueError naming what differs."""
    metadata = json.loads((directory / METADATA).read_text())
    asked = {"format": FORMAT, "tokenizer_digest": tokenizer.digest, "context_length": context_length}
    wrong = [f"{n} is {metadata.get(n)!r}, expected {x!r}" for n, x in asked.items() if metadata.get(n) != x]
    if not wrong:
        size = _dtype(metadata).itemsize
        there = {name: size for name, (size, _) in files_in(directory).items()}
        expected = {shard_name(i): rows * size for i, rows in enumerate(metadata["shard_rows"])}
        wrong = [
            f"{name} has {there.get(name)} bytes, expected {size}: it was altered or lost"
            for name, size in expected.items()
            if there.get(name) != size
        ]
    if wrong:
        raise ValueError(f"packed rows in {directory}: {'; '.join(wrong[:3])}. Delete the directory to pack again")
    return Rows(directory, metadata)
