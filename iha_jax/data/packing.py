"""Packing: documents tokenized once, laid end to end, cut into rows of one length.

A document is `[separator] + tokens + [separator]`. Rows hold N + 1 tokens and overlap by one, so that inputs
`row[:-1]` and targets `row[1:]` predict every token of a shard but its first exactly once. Segment ids count a row's
documents from 1; 0 is padding, in the last row of a shard only. Shards are cut by the number of documents alone, so
rows and their order do not depend on how many processes made them.

Rows of conversations hold whole ones (`conversations.py`), and say which tokens count in the loss.
"""

import hashlib
import json
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from iha_jax.data.chat import RENDERING
from iha_jax.data.conversations import conversation_rows, is_chat
from iha_jax.data.jobs import Facts, run_jobs
from iha_jax.data.storage import tidy, write_text, writing
from iha_jax.data.text import TextSource, is_text, open_text_source
from iha_jax.data.tokenizers import Tokenizer, encode_checked, load_tokenizer

FORMAT = 3  # how rows lie in their files
_CONTENT = 2  # which rows a corpus gives: part of their digest, so that runs go on when only the files change
METADATA, PARTS = "rows.json", ".parts"
MIN_SHARD_DOCUMENTS, MAX_SHARDS = 1024, 4096
_BATCH_DOCUMENTS, _BATCH_BYTES = 256, 1 << 24  # tokenized in one call
_CUT_TOKENS = 1 << 21  # of a long document, cut in one go
_COUNTS = ("num_documents", "num_tokens", "num_bytes", "num_token_bytes", "left_out", "truncated", "truncated_tokens")


def shard_name(index: int) -> str:
    return f"rows-{index:05d}.bin"


def row_dtype(vocab_size: int, context_length: int, *, counted: bool = False) -> np.dtype:
    """A row on disk: N + 1 token ids, then N + 1 segment ids, in the smallest unsigned integers that hold them, then,
    where not all of them count, whether each does; then their checksum."""
    length = context_length + 1
    tokens = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    segments = np.uint16 if length < 1 << 16 else np.uint32
    fields = [("tokens", tokens, (length,)), ("segment_ids", segments, (length,))]
    fields += [("counted", np.uint8, (length,))] if counted else []
    return np.dtype([*fields, ("crc32", np.uint32)])


def checksums(rows: np.ndarray) -> list[int]:
    """CRC-32 of all that stands before it in each row (records of `row_dtype`) as they lie on disk."""
    content = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)[:, :-4]
    return [zlib.crc32(row) for row in content]


@dataclass(frozen=True)
class Reader:
    """How another process opens the source again."""

    source: str
    split: str
    data_dir: str
    cache_dir: str
    text_feature: str

    def open(self) -> TextSource:
        options = dict(data_dir=self.data_dir, cache_dir=self.cache_dir, text_feature=self.text_feature)
        return open_text_source(self.source, self.split, **options)


def pack(
    documents: TextSource,
    reader: Reader,
    tokenizer: Tokenizer,
    context_length: int,
    directory: epath.Path,
    *,
    workers: int = 1,
) -> None:
    """Packs every shard that is not there yet, `workers` at a time, then writes the metadata: rows count as prepared
    only then. An interrupted call leaves finished shards behind, and the next one goes on from them.

    The corpus digest is SHA-256 over the shards' digests, each over the SHA-256 of its documents in order; the rows'
    digest adds tokenizer, context length and format. Files of a bucket are copied to the temporary directory (TMPDIR),
    each once and no longer than it is needed.

    Raises:
      ValueError: when no document is valid text, a line is no conversation, or a token id is outside the vocabulary.
        Nothing is left then.
    """
    per_shard = max(MIN_SHARD_DOCUMENTS, -(-len(documents) // MAX_SHARDS))
    ranges = [(at, min(at + per_shard, len(documents))) for at in range(0, len(documents), per_shard)]
    results = []
    with tempfile.TemporaryDirectory(prefix="iha_jax_") as staging:
        jobs = [(reader, tokenizer.spec, context_length, directory, i, *ends, staging) for i, ends in enumerate(ranges)]
        label = f"packing {reader.source}, {reader.split}"
        try:
            for facts in run_jobs(_pack_shard, jobs, directory / PARTS, workers=workers, label=label):
                results.append(facts)
                _unstage(documents, ranges, len(results), staging)
            metadata = _metadata(results, reader, tokenizer, context_length)
        except ValueError:
            directory.rmtree(missing_ok=True)
            raise
    write_text(directory / METADATA, json.dumps(metadata, indent=2))
    tidy(directory, PARTS)


def _unstage(documents: TextSource, ranges: list[tuple[int, int]], done: int, staging: str) -> None:
    """Removes the copies of files that no range after the first `done` needs."""
    needed = documents.files(*ranges[done]) if done < len(ranges) else set()
    for name in documents.files(*ranges[done - 1]) - needed:
        (Path(staging) / name).unlink(missing_ok=True)


def _metadata(results: list[Facts], reader: Reader, tokenizer: Tokenizer, context_length: int) -> Facts:
    chat = is_chat(reader.source)
    counts = {name: sum(facts.get(name, 0) for facts in results) for name in _COUNTS}
    total = counts["left_out"] + counts["num_documents"]
    if not counts["num_documents"]:
        why = f"in {context_length + 1} tokens no answer begins" if chat else "no document is valid UTF-8 text"
        raise ValueError(f"data source {reader.source!r}, split {reader.split!r}: {why}")
    if counts["left_out"]:
        why = "longer than a row before any answer" if chat else "empty or not valid UTF-8"
        print(f"left out {counts['left_out']} of {total} documents: {why}", file=sys.stderr)
    if counts["truncated"]:
        of = f"{counts['truncated']} of {total} conversations are longer than {context_length + 1} tokens"
        print(f"{of}: {counts['truncated_tokens']:,} tokens at their ends are left out", file=sys.stderr)
    if abs(counts["num_token_bytes"] / counts["num_bytes"] - 1) > 0.005:
        print(
            f"note: tokens stand for {counts['num_token_bytes']:,} bytes, the text has {counts['num_bytes']:,}: this "
            f"tokenizer changes text, so bits per byte are per byte of what it keeps",
            file=sys.stderr,
        )
    corpus_digest = hashlib.sha256("".join(facts["digest"] for facts in results).encode()).hexdigest()
    rows_key = f"{_CONTENT}:{corpus_digest}:{tokenizer.digest}:{context_length}" + (f":chat{RENDERING}" if chat else "")
    return {
        "format": FORMAT,
        "digest": hashlib.sha256(rows_key.encode()).hexdigest(),
        "corpus_digest": corpus_digest,
        "tokenizer_digest": tokenizer.digest,
        "tokenizer": tokenizer.spec,
        "vocab_size": tokenizer.vocab_size,
        "context_length": context_length,
        "counted": chat,
        "source": reader.source,
        "split": reader.split,
        **counts,
        "max_token_id": max(facts["max_token_id"] for facts in results),
        "shard_rows": [facts["rows"] for facts in results],
    }


def _pack_shard(
    reader: Reader,
    spec: str,
    context_length: int,
    directory: epath.Path,
    index: int,
    start: int,
    stop: int,
    staging: str,
) -> Facts:
    """One job: documents [start, stop) to one file of rows, and what is in it."""
    tokenizer, digest = load_tokenizer(spec), hashlib.sha256()
    chat = is_chat(reader.source)
    dtype = row_dtype(tokenizer.vocab_size, context_length, counted=chat)
    facts: Facts = dict.fromkeys((*_COUNTS, "max_token_id", "rows"), 0)

    def texts() -> Iterator[bytes]:
        for document in reader.open().read(start, stop, staging):
            digest.update(hashlib.sha256(document).digest())
            if document and is_text(document):
                yield document
            else:
                facts["left_out"] += 1

    with writing(directory / shard_name(index)) as path, open(path, "wb") as file:
        batches = _batches(texts())
        whole = conversation_rows(batches, tokenizer, dtype, facts)
        for rows in whole if chat else cut_rows(_tokenized(batches, tokenizer, facts), dtype):
            rows["crc32"] = checksums(rows)
            file.write(rows.tobytes())
            facts["rows"] += len(rows)
    return facts | {"digest": digest.hexdigest()}


def _tokenized(batches: Iterator[list[bytes]], tokenizer: Tokenizer, facts: Facts) -> Iterator[np.ndarray]:
    separator = np.array([tokenizer.document_id], np.int32)
    for batch in batches:
        for text, tokens in zip(batch, encode_checked(tokenizer, batch), strict=True):
            facts["num_documents"] += 1
            facts["num_tokens"] += tokens.size + 2
            facts["num_bytes"] += len(text)
            facts["num_token_bytes"] += int(tokenizer.byte_lengths[tokens].sum())
            facts["max_token_id"] = max(facts["max_token_id"], int(tokens.max(initial=0)), tokenizer.document_id)
            yield np.concatenate([separator, tokens, separator])


def _batches(texts: Iterator[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def cut_rows(documents: Iterator[np.ndarray], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Rows (records of `dtype`, N + 1 tokens, stride N) of documents laid end to end, some at a time."""
    length: Any = dtype["tokens"].shape[0]
    stride = length - 1
    at_once = max(1, _CUT_TOKENS // length)
    tokens, owners = np.zeros(0, np.int32), np.zeros(0, np.int32)  # owners: which document, counted over the shard

    def records(first: int, last: int) -> np.ndarray:
        rows = np.zeros(last - first, dtype)
        at = np.arange(first, last)[:, None] * stride + np.arange(length)
        rows["tokens"] = tokens[at]
        rows["segment_ids"] = owners[at] - owners[at[:, :1]] + 1
        return rows

    for number, document in enumerate(documents):
        tokens = np.concatenate([tokens, document])
        owners = np.concatenate([owners, np.full(document.size, number, np.int32)])
        whole = (tokens.size - 1) // stride
        for first in range(0, whole, at_once):
            yield records(first, min(first + at_once, whole))
        tokens, owners = tokens[whole * stride :], owners[whole * stride :]
    if tokens.size > 1:
        used = tokens.size
        tokens, owners = (np.pad(x, (0, length - used)) for x in (tokens, owners))
        last = records(0, 1)
        last["segment_ids"][:, used:] = 0
        yield last
