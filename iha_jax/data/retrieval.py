"""Generated multi-key retrieval: which value stood behind this key? Every row is a function of (seed, split, index).

A text is byte tokens: the document separator, then needles `kV` (a key that is a letter, a value of another alphabet),
and as haystack noise of a third one. A needle whose key stood there before is a query: it repeats the value, and its
value alone counts in the loss. The other needles are distractors: as in RULER's multi-key tasks their keys all differ.
A guess is right once in 32, a guess among the values of a text of 16 needles once in 16.

Training rows of N tokens hold one text of N tokens or 8 short ones, each of 2 to 16 needles and then as many queries as
there is room for, without noise: short texts of few needles are learned first. One in eight keys is held out: training
texts have it as a distractor and never ask for it.
Evaluation asks for `QUERIES` of 16 keys behind all needles, trained ones or held-out ones, in texts of N/4 to 4 N
tokens, filled up with noise. The validation split is such texts of N tokens, with held-out keys. The spec of the source
is "retrieval", or "retrieval:SEED" for other texts.
"""

import hashlib

import numpy as np

from iha_jax.data.tokenizers import Bytes, Tokenizer

PREFIX = "retrieval"
VERSION = 3  # of the texts: a change of anything below makes others
SPLITS = ("train", "validation", "trained", "held_out")  # the last two: of evaluation, by whose keys are asked for
KEYS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyzABCDEF", np.uint8)
VALUES = np.arange(33, 65)  # digits and punctuation
NOISE = np.frombuffer(b"[\\]^_`{|}~", np.uint8)
IS_HELD_OUT = np.arange(KEYS.size) % 8 == 5
ITEM = 2  # tokens of a needle or query
NEEDLES, QUERIES = 16, 4  # of a text in evaluation; NEEDLES: in training at most
TEXTS = (1, 8, 8, 8)  # of a training row
SHORTEST = 1 + ITEM * (NEEDLES + QUERIES)  # tokens of a text in evaluation
_SEPARATOR = Bytes.document_id
_ROWS = {"train": 1 << 24}
_EVALUATION_ROWS = 1 << 16


def is_retrieval(source: str) -> bool:
    return source.partition(":")[0] == PREFIX


def evaluation_lengths(context_length: int) -> tuple[int, ...]:
    """Tokens of a text at which accuracy is measured: N/4 to N, as in training, and 2 N, 4 N, beyond it."""
    return tuple(context_length * factor // 4 for factor in (1, 2, 4, 8, 16))


class RetrievalRows:
    """Rows as `data.rows.Rows` has them, made when asked for: `rows[i]` is `{"tokens", "segment_ids", "counted"}`,
    int32 [N + 1] each.

    Raises:
      ValueError: for a context that is too short for a text, another tokenizer than bytes, or a seed that is no number.
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
        if context_length < SHORTEST:
            raise ValueError(
                f"data source {source!r}: a text of {context_length} tokens; expected {SHORTEST} or more, so "
                f"{4 * SHORTEST} or more for config.model.context_length"
            )
        self.context_length = context_length
        self._split, self._seed = split, int(seed or 0)
        self.corpus_digest = hashlib.sha256(f"{PREFIX} {VERSION}:{self._seed}".encode()).hexdigest()
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
        room = length // texts - 1
        for i in range(texts):
            make = _training_items if self._split == "train" else _evaluation_items
            keys, values, queries = make(rng, room // ITEM, self._split)
            tokens, counted = _with_noise(rng, np.stack([KEYS[keys], VALUES[values]], axis=1), queries, room)
            here = slice(i * (room + 1), (i + 1) * (room + 1))
            row["tokens"][here] = [_SEPARATOR, *tokens]
            row["segment_ids"][here] = i + 1
            row["counted"][here][1:] = counted
        return row


Items = tuple[np.ndarray, np.ndarray, np.ndarray]  # key and value of each needle and query [n], and which are queries


def _training_items(rng: np.random.Generator, most: int, split: str) -> Items:
    """2 to `NEEDLES` needles, then queries for trained keys among them up to `most` items."""
    needles = int(rng.integers(2, min(NEEDLES, max(2, most * 2 // 3)) + 1))
    keys = rng.permutation(KEYS.size)[:needles]
    trained = np.flatnonzero(~IS_HELD_OUT[keys])
    if trained.size == 0:
        keys[0], trained = rng.choice(np.flatnonzero(~IS_HELD_OUT)), np.zeros(1, int)
    chosen = np.concatenate([np.arange(needles), rng.choice(trained, most - needles)])
    return keys[chosen], rng.integers(0, VALUES.size, needles)[chosen], np.arange(most) >= needles


def _evaluation_items(rng: np.random.Generator, most: int, split: str) -> Items:
    """`NEEDLES` needles, then `QUERIES` different ones of them, of held-out keys unless `split` is "trained"."""
    wanted = rng.permutation(np.flatnonzero(~IS_HELD_OUT if split == "trained" else IS_HELD_OUT))[:QUERIES]
    others = rng.permutation(np.setdiff1d(np.arange(KEYS.size), wanted))[: NEEDLES - QUERIES]
    keys = rng.permutation(np.concatenate([wanted, others]))
    chosen = np.concatenate([np.arange(NEEDLES), rng.permutation(np.flatnonzero(np.isin(keys, wanted)))])
    return keys[chosen], rng.integers(0, VALUES.size, NEEDLES)[chosen], np.arange(chosen.size) >= NEEDLES


def _with_noise(
    rng: np.random.Generator, items_nI: np.ndarray, queries_n: np.ndarray, room: int
) -> tuple[np.ndarray, np.ndarray]:
    """`room` tokens: the items in their order, noise at random before needles; and which tokens are asked for."""
    count = len(items_nI)
    needles = np.flatnonzero(~queries_n)
    before = np.bincount(rng.choice(needles, room - ITEM * count), minlength=count)  # noise before each item
    at = np.cumsum(before) + ITEM * np.arange(count)
    tokens, counted = rng.choice(NOISE, room), np.zeros(room, np.int32)
    for place in range(ITEM):
        tokens[at + place] = items_nI[:, place]
    counted[at + ITEM - 1] = queries_n
    return tokens, counted
