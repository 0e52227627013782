"""Packed rows: documents tokenized once, laid end to end, cut into rows of one length, stored as ArrayRecord.

A document is `[separator] + tokens + [separator]`. Rows hold N + 1 tokens and overlap by one, so that inputs
`row[:-1]` and targets `row[1:]` predict every token of a shard exactly once. Segment ids count a row's documents from
1; 0 is padding, in the last row of a shard only. The number of shards depends on the corpus alone, so rows and their
order do not depend on how many processes made them.
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from iha_jax.data.text import TextSource, default_cache, is_text, open_text_source
from iha_jax.data.tokenizers import Tokenizer, load_tokenizer

FORMAT = 1
SHARD_DOCUMENTS = 8192
METADATA = "rows.json"


class Rows:
    """Random access to packed rows. `rows[i]` is `{"tokens": int32 [N + 1], "segment_ids": int32 [N + 1]}`."""

    def __init__(self, directory: epath.Path, metadata: dict[str, Any]):
        self._directory, self._metadata = directory, metadata
        self.digest: str = metadata["digest"]
        self.corpus_digest: str = metadata["corpus_digest"]
        self.context_length: int = metadata["context_length"]
        self.num_documents: int = metadata["num_documents"]
        self.num_tokens: int = metadata["num_tokens"]
        self.num_bytes: int = metadata["num_bytes"]
        self.max_token_id: int = metadata["max_token_id"]
        self._dtype = np.dtype(metadata["token_dtype"])
        self._source: Any = None

    def __len__(self) -> int:
        return sum(self._metadata["shard_rows"])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if self._source is None:  # opened where it is used: each loader process has its own file handles
            from grain.sources import ArrayRecordDataSource

            names = [str(self._directory / shard_name(i)) for i in range(len(self._metadata["shard_rows"]))]
            self._source = ArrayRecordDataSource(names)
        raw, length = self._source[int(index)], self.context_length + 1
        tokens = np.frombuffer(raw, self._dtype, count=length)
        segments = np.frombuffer(raw, np.uint16, offset=tokens.nbytes)
        return {"tokens": tokens.astype(np.int32), "segment_ids": segments.astype(np.int32)}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}


def shard_name(index: int) -> str:
    return f"rows-{index:05d}.array_record"


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
        vocabulary, or cached rows that do not match what is asked.
    """
    if context_length < 1:
        raise ValueError(f"context_length = {context_length}: expected at least 1")
    documents = open_text_source(source, split, data_dir=data_dir, cache_dir=cache_dir, text_feature=text_feature)
    key = f"{FORMAT}:{documents.fingerprint}:{tokenizer.digest}:{context_length}"
    directory = default_cache(cache_dir) / "rows" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not (directory / METADATA).exists():
        reader = _Reader(source, split, data_dir, cache_dir, text_feature)
        pack(len(documents), reader, tokenizer, context_length, directory, workers=workers)
    return read_rows(directory, tokenizer, context_length)


def read_rows(directory: epath.Path, tokenizer: Tokenizer, context_length: int) -> Rows:
    """Rows that were packed before, checked against what is asked. Raises ValueError naming what differs."""
    metadata = json.loads((directory / METADATA).read_text())
    asked = {"format": FORMAT, "tokenizer_digest": tokenizer.digest, "context_length": context_length}
    for name, expected in asked.items():
        if metadata.get(name) != expected:
            raise ValueError(
                f"packed rows in {directory}: {name} is {metadata.get(name)!r}, expected {expected!r}; delete the "
                f"directory to pack again"
            )
    rows = Rows(directory, metadata)
    if rows.max_token_id >= tokenizer.vocab_size:
        raise ValueError(
            f"packed rows in {directory} hold token id {rows.max_token_id}; the vocabulary has {tokenizer.vocab_size}"
        )
    if not len(rows):
        raise ValueError(f"packed rows in {directory}: there are none")
    return rows


@dataclass(frozen=True)
class _Reader:
    """How a loader process opens the source again."""

    source: str
    split: str
    data_dir: str
    cache_dir: str
    text_feature: str

    def open(self) -> TextSource:
        options = dict(data_dir=self.data_dir, cache_dir=self.cache_dir, text_feature=self.text_feature)
        return open_text_source(self.source, self.split, **options)


def pack(
    num_documents: int,
    reader: _Reader,
    tokenizer: Tokenizer,
    context_length: int,
    directory: epath.Path,
    *,
    workers: int = 1,
) -> None:
    """Packs every shard that is not there yet, `workers` at a time, then writes the metadata: rows count as prepared
    only then. An interrupted call leaves finished shards behind, and the next one goes on from them.

    The corpus digest is SHA-256 over the shards' digests, each over the SHA-256 of its documents in order; the rows'
    digest adds tokenizer, context length and format.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = -(-num_documents // SHARD_DOCUMENTS)
    jobs = [(reader, tokenizer.spec, context_length, directory, i, num_documents) for i in range(shards)]
    results = []
    if workers > 1 and shards > 1:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            for done, result in enumerate(pool.map(_pack_shard, *zip(*jobs, strict=True)), 1):
                results.append(result)
                _report(done, shards, directory)
    else:
        for done, job in enumerate(jobs, 1):
            results.append(_pack_shard(*job))
            _report(done, shards, directory)
    counts = {name: sum(r[name] for r in results) for name in ("num_documents", "num_tokens", "num_bytes", "invalid")}
    if not counts["num_documents"]:
        raise ValueError(f"data source {reader.source!r}, split {reader.split!r}: no document is valid UTF-8 text")
    corpus_digest = hashlib.sha256("".join(r["digest"] for r in results).encode()).hexdigest()
    rows_key = f"{FORMAT}:{corpus_digest}:{tokenizer.digest}:{context_length}"
    facts = {
        "digest": hashlib.sha256(rows_key.encode()).hexdigest(),
        "corpus_digest": corpus_digest,
        "tokenizer_digest": tokenizer.digest,
    }
    metadata = (
        facts
        | counts
        | {
            "format": FORMAT,
            "tokenizer": tokenizer.spec,
            "context_length": context_length,
            "source": reader.source,
            "split": reader.split,
            "token_dtype": str(np.dtype(_token_dtype(tokenizer))),
            "max_token_id": max(r["max_token_id"] for r in results),
            "shard_rows": [r["rows"] for r in results],
        }
    )
    _write_atomically(directory / METADATA, json.dumps(metadata, indent=2))


def _report(done: int, shards: int, directory: epath.Path) -> None:
    if shards > 1 or done == shards:
        print(f"packed {done} of {shards} shard(s) of rows into {directory}", file=sys.stderr, flush=True)


def _token_dtype(tokenizer: Tokenizer) -> type:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def _write_atomically(path: epath.Path, text: str) -> None:
    scratch = path.parent / f"{path.name}.{os.getpid()}.tmp"
    scratch.write_text(text)
    scratch.replace(path)


def _pack_shard(
    reader: _Reader, spec: str, context_length: int, directory: epath.Path, index: int, total: int
) -> dict[str, Any]:
    from array_record.python.array_record_module import ArrayRecordWriter

    facts_path = directory / f"{shard_name(index)}.json"
    if facts_path.exists():
        return json.loads(facts_path.read_text())
    documents, tokenizer = reader.open(), load_tokenizer(spec)
    facts: dict[str, Any] = dict.fromkeys(
        ("num_documents", "num_tokens", "num_bytes", "invalid", "max_token_id", "rows"), 0
    )
    shard_digest = hashlib.sha256()

    def tokenized() -> Iterator[np.ndarray | None]:
        for i in chosen:
            document = documents[i]
            shard_digest.update(hashlib.sha256(document).digest())
            yield _tokenized(document, tokenizer, facts)

    chosen = range(index * SHARD_DOCUMENTS, min((index + 1) * SHARD_DOCUMENTS, total))
    scratch = directory / f"{shard_name(index)}.{os.getpid()}.tmp"
    writer = ArrayRecordWriter(str(scratch), "group_size:1")
    try:
        for row in _rows(tokenized(), context_length, tokenizer):
            writer.write(row)
            facts["rows"] += 1
    finally:
        writer.close()
    scratch.replace(directory / shard_name(index))
    facts["digest"] = shard_digest.hexdigest()
    _write_atomically(facts_path, json.dumps(facts))
    return facts


def _tokenized(document: bytes, tokenizer: Tokenizer, facts: dict[str, Any]) -> np.ndarray | None:
    if not document or not is_text(document):
        facts["invalid"] += 1
        return None
    tokens = tokenizer.encode(document)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size):
        raise ValueError(f"the tokenizer gave id {tokens.max()}; its vocabulary has {tokenizer.vocab_size}")
    facts["num_documents"] += 1
    facts["num_tokens"] += tokens.size + 2
    facts["num_bytes"] += len(document)
    facts["max_token_id"] = max(facts["max_token_id"], int(tokens.max(initial=0)), tokenizer.document_id)
    return np.concatenate([[tokenizer.document_id], tokens, [tokenizer.document_id]])


def _rows(documents: Iterator[np.ndarray | None], N: int, tokenizer: Tokenizer) -> Iterator[bytes]:
    """Rows of N + 1 tokens with stride N, as bytes: tokens, then segment ids."""
    dtype = _token_dtype(tokenizer)
    tokens, owners = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def row(tokens: np.ndarray, owners: np.ndarray) -> bytes:
        segments = np.zeros(N + 1, np.uint16)
        segments[: owners.size] = np.cumsum(np.diff(owners, prepend=owners[:1]) != 0) + 1
        return np.pad(tokens, (0, N + 1 - tokens.size)).astype(dtype).tobytes() + segments.tobytes()

    for number, document in enumerate(documents):
        if document is None:
            continue
        tokens = np.concatenate([tokens, document])
        owners = np.concatenate([owners, np.full(document.size, number)])
        whole = max(0, (tokens.size - 1) // N)
        for start in range(0, whole * N, N):
            yield row(tokens[start : start + N + 1], owners[start : start + N + 1])
        tokens, owners = tokens[whole * N :], owners[whole * N :]
    if tokens.size > 1:
        yield row(tokens, owners)
