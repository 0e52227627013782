"""Multi-key retrieval, generated: which value stood behind this key? Every row is a function of (seed, split, index).

A text is byte tokens: the document separator, then needles `abX` (a key of two letters, a value that is a capital or a
digit). A needle whose key stood there before is a query: it repeats the value, and its value alone counts in the loss.
All other needles are distractors; as in RULER's multi-key tasks all their keys differ, and most share a letter with
several others, so both letters must be matched at once. A guess is right once in 36.

Training rows of N tokens hold 1, 2, 4 or 8 texts of about N to N/8 tokens; up to two thirds of a text's items
are queries, behind all needles in some texts and among them in most: the nearest are easy, and learned first. A tenth
of the keys is held out: no training text has them. Evaluation asks for `QUERIES` keys behind all needles, trained ones
or held-out ones, at lengths from N/4 to 4 N. The validation split is such texts of N tokens, with held-out keys. The
spec of the source is "retrieval", or "retrieval:SEED" for other texts.
"""

import hashlib

import numpy as np

from iha_jax.data.tokenizers import Bytes, Tokenizer

PREFIX = "retrieval"
SPLITS = ("train", "validation", "trained", "held_out")  # the last two: of evaluation, by whose keys are asked for
ITEM, ANSWER = 3, 1  # tokens of a needle or query, and of its value at the end
QUERIES = 4  # of a text in evaluation
TEXTS = (1, 2, 4, 8)  # of a training row
AMONG = 0.6  # share of the training texts whose queries stand among the needles
_SEPARATOR = Bytes.document_id
_ROWS = {"train": 1 << 24}
_EVALUATION_ROWS = 1 << 16


def is_retrieval(source: str) -> bool:
    return source.partition(":")[0] == PREFIX


def _is_held_out(key: int) -> bool:
    """Whether a key (first letter * 26 + second) is never in a training text: about a tenth of them."""
    return hashlib.sha256(f"key {key}".encode()).digest()[0] % 10 == 0


VALUES = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", np.uint8)
KEYS = np.arange(26 * 26)
HELD_OUT = np.array([key for key in KEYS if _is_held_out(int(key))])
TRAINED = np.setdiff1d(KEYS, HELD_OUT)


SHORTEST, LONGEST = 1 + 2 * QUERIES * ITEM, ITEM * len(TRAINED)  # tokens of a text


def evaluation_lengths(context_length: int) -> tuple[int, ...]:
    """Tokens of a text at which accuracy is measured: N/4, N/2, N, which were trained, and 2 N, 4 N, which were not."""
    return tuple(context_length * factor // 4 for factor in (1, 2, 4, 8, 16))


class RetrievalRows:
    """Rows as `data.rows.Rows` has them, made when asked for: `rows[i]` is `{"tokens", "segment_ids", "counted"}`,
    int32 [N + 1] each.

    Raises:
      ValueError: for a context that is too short for a text or too long for the keys there are, another tokenizer than
        bytes, or a seed that is no number.
    """

    is_local = True
    left_out = truncated = truncated_tokens = 0

    def __init__(self, source: str, split: str, tokenizer: Tokenizer, context_length: int):
        _, _, seed = source.partition(":")
        if split not in SPLITS:
            raise ValueError(f"data source {source!r} has no split {split!r}; its splits: {', '.join(SPLITS)}")
        if seed and not seed.isdecimal():
            raise ValueError(f"data source {source!r}: expected 'retrieval', or 'retrieval:SEED' with a whole number")
        if tokenizer.spec != Bytes.spec:
            raise ValueError(f"data source {source!r} needs config.data.tokenizer = 'bytes', not {tokenizer.spec!r}")
        if not SHORTEST <= context_length <= LONGEST:
            raise ValueError(
                f"data source {source!r}: a text of {context_length} tokens; expected {SHORTEST} to {LONGEST}, so "
                f"{4 * SHORTEST} to {LONGEST // 4} for config.model.context_length"
            )
        self.context_length = context_length
        self._split, self._seed = split, int(seed or 0)
        self.corpus_digest = hashlib.sha256(f"{__doc__}:{self._seed}".encode()).hexdigest()
        self.digest = hashlib.sha256(f"{self.corpus_digest}:{split}:{context_length}".encode()).hexdigest()
        self.num_documents = len(self)
        self.num_tokens = len(self) * (context_length + 1)

    def __len__(self) -> int:
        return _ROWS.get(self._split, _EVALUATION_ROWS)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = range(len(self))[int(index)]
        rng = np.random.default_rng([self._seed, SPLITS.index(self._split), self.context_length, index])
        length = self.context_length + 1
        row = {name: np.zeros(length, np.int32) for name in ("tokens", "segment_ids", "counted")}
        texts = TEXTS[rng.integers(len(TEXTS))] if self._split == "train" else 1
        for i in range(texts):
            items, queries = self._text(rng, (length // texts - 1) // ITEM)
            here = slice(i * (length // texts), i * (length // texts) + 1 + items.size)
            row["tokens"][here] = [_SEPARATOR, *items.ravel()]
            row["segment_ids"][here] = i + 1
            row["counted"][here][1:] = (queries[:, None] & (np.arange(ITEM) >= ITEM - ANSWER)).ravel()
        return row

    def _text(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [count, ITEM] of needles and queries, and which are queries, bool [count]."""
        if self._split == "train":
            queries = np.arange(count) >= count - rng.integers(1, count * 2 // 3 + 1)
            if rng.random() < AMONG:
                queries[1:] = rng.permutation(queries[1:])
            before = np.cumsum(~queries)  # needles so far
            keys = rng.choice(TRAINED, before[-1], replace=False)
            chosen = np.where(queries, rng.integers(0, before), before - 1)
        else:  # the keys asked for stand first, and are moved with all others
            queries = np.arange(count) >= count - QUERIES
            wanted = rng.choice(TRAINED if self._split == "trained" else HELD_OUT, QUERIES, replace=False)
            others = rng.choice(np.setdiff1d(KEYS, wanted), count - 2 * QUERIES, replace=False)
            order = rng.permutation(count - QUERIES)
            keys = np.concatenate([wanted, others])[order]
            chosen = np.concatenate([np.arange(keys.size), rng.permutation(np.flatnonzero(order < QUERIES))])
        return _items(keys, rng.integers(0, VALUES.size, keys.size))[chosen], queries


def _items(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Tokens [n, 3] of `abX`."""
    return np.stack([ord("a") + keys // 26, ord("a") + keys % 26, VALUES[values]], axis=1)
