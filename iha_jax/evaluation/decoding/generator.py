"""Continuations of texts: prompts in batches through `prefill`, then a few tokens at a time until all samples end.

Shapes: B rows of a batch, one a sample; Q prompts of a batch; N tokens of padded prompts; T tokens of one call.
"""

import contextlib
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from iha_jax.config import ModelConfig
from iha_jax.data.tokenizers import Tokenizer
from iha_jax.evaluation.decoding.drawing import Drawing, draw, keys
from iha_jax.evaluation.decoding.transformer import Caches, Decoder, prefill
from iha_jax.evaluation.text_model import DOCUMENT, LENGTH, STOP, Completion, Sample, Sampling
from iha_jax.model.transformer import Parameters
from iha_jax.parallel.mesh import batch_shards
from iha_jax.parallel.rules import constrain

TOKENS_A_CALL = 16  # between two looks of the host at what was drawn
SHORTEST = 32  # bucket of prompt and cache lengths
ANCHOR = 8  # tokens of the prompt that a sample is decoded after: some tokenizers drop a text's first space


@dataclass
class _Row:
    """One sample as it grows."""

    prompt: int
    sample: int
    anchor: tuple[int, ...]
    limit: int  # tokens
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ended: str | None = None

    def extend(self, drawn: Iterable[int], stop: Sequence[str], tokenizer: Tokenizer) -> None:
        """Takes tokens until the sample ends; its text ends before the stop string that is whole first."""
        before = len(self.tokens)
        for token in drawn:
            if token == tokenizer.document_id:
                self.ended = DOCUMENT
                break
            self.tokens.append(int(token))
            if len(self.tokens) == self.limit:
                self.ended = LENGTH
                break
        self.text = self._decoded(tokenizer, len(self.tokens))
        if not any(string in self.text for string in stop):
            return
        for count in range(before + 1, len(self.tokens) + 1):
            text = self._decoded(tokenizer, count)
            found = [text.index(string) for string in stop if string in text]
            if found:
                self.tokens, self.text, self.ended = self.tokens[:count], text[: min(found)], STOP
                return

    def _decoded(self, tokenizer: Tokenizer, count: int) -> str:
        before, tokens = tokenizer.decode(self.anchor), self.tokens[:count]
        text = tokenizer.decode([*self.anchor, *tokens])
        return text[len(before) :] if text.startswith(before) else tokenizer.decode(tokens)


class Generator:
    """A model that continues texts (`TextModel.complete`).

    Every prompt is the beginning of a document: the document separator stands before it, and an empty prompt is that
    alone. A sample ends before the first stop string, before the document separator, after `max_tokens`, or where the
    context ends. Prompts keep their last `max(context_length - max_tokens, context_length // 2)` tokens, the separator
    counted, so that a large `max_tokens` leaves half of the context to the prompt; `too_long="refuse"` raises instead.
    A sample depends on seed, prompt number, sample number and token number, not on batch size or order.

    `batch_size` rows are decoded together, rounded up to the shards of the mesh's batch axes. Lengths of prompts and
    caches come in powers of two: few programs are compiled.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: Parameters,
        tokenizer: Tokenizer,
        *,
        mesh: Mesh | None = None,
        batch_size: int = 16,
        too_long: str = "truncate",
    ):
        """Raises ValueError for a bidirectional model, a tokenizer of more tokens than it has, or a wrong argument."""
        if not config.causal:
            raise ValueError("config.model.causal = False: a bidirectional model has no next token; expected True")
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"tokenizer {tokenizer.spec!r} has {tokenizer.vocab_size} tokens; the model has {config.vocab_size}"
            )
        if too_long not in ("truncate", "refuse"):
            raise ValueError(f"too_long = {too_long!r}: expected 'truncate' or 'refuse'")
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: expected at least 1")
        self.config, self.parameters, self.tokenizer, self.mesh = config, parameters, tokenizer, mesh
        self.context_length, self.too_long = config.context_length, too_long
        self._shards = 1 if mesh is None else batch_shards(mesh)
        self._token_shards = 1 if mesh is None else mesh.shape["context"] * mesh.shape["tensor"]
        self.batch_size = -(-batch_size // self._shards) * self._shards
        self._prefill = jax.jit(functools.partial(prefill, config), static_argnames="length")
        self._begin = jax.jit(_begin, static_argnames="drawing")
        self._advance = jax.jit(
            functools.partial(_advance, config), static_argnames=("drawing", "document"), donate_argnames="state"
        )

    def complete(self, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
        """Continuations of each prompt, in order; `prompt_tokens` counts the document separator.

        Raises:
          ValueError: for a value of `sampling` out of range, or, where prompts are refused, one that is too long.
        """
        drawing = Drawing.of(sampling, self.tokenizer.vocab_size)
        for name in ("max_tokens", "samples"):
            if getattr(sampling, name) < 1:
                raise ValueError(f"{name} = {getattr(sampling, name)}: expected at least 1")
        if not 0 <= sampling.seed < 2**32:
            raise ValueError(f"seed = {sampling.seed}: expected 0 to 2**32 - 1")
        if any(not string for string in sampling.stop):
            raise ValueError(f"stop = {sampling.stop}: an empty string would end every sample at once")
        encoded = self.tokenizer.encode_batch([prompt.encode() for prompt in prompts])
        whole = [np.concatenate([[self.tokenizer.document_id], ids]).astype(np.int32) for ids in encoded]
        kept = [self._cut(number, ids, sampling.max_tokens) for number, ids in enumerate(whole)]
        rows = {number: self._rows(number, ids, sampling) for number, ids in enumerate(kept)}
        order = sorted(range(len(kept)), key=lambda number: len(kept[number]))
        together = max(1, self.batch_size // sampling.samples)
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            for start in range(0, len(order), together):
                numbers = order[start : start + together]
                self._run({number: kept[number] for number in numbers}, rows, together, sampling, drawing)
        return [
            Completion(len(ids), max(0, len(ids) - len(kept[number]) - 1), tuple(map(_finished, rows[number])))
            for number, ids in enumerate(whole)
        ]

    def _cut(self, number: int, ids: np.ndarray, max_tokens: int) -> np.ndarray:
        if ids.max() >= self.config.vocab_size or ids.min() < 0:
            raise ValueError(f"prompt {number} has token {ids.max()}; expected ids below {self.config.vocab_size}")
        room = max(self.context_length - max_tokens, self.context_length // 2, 1)
        if len(ids) - 1 > room and self.too_long == "refuse":
            raise ValueError(
                f"prompt {number} has {len(ids) - 1} tokens; of a context of {self.context_length} at most {room} "
                f"are the prompt's where {max_tokens} new ones may follow"
            )
        return ids[-room:]

    def _rows(self, number: int, ids: np.ndarray, sampling: Sampling) -> list[_Row]:
        anchor = tuple(int(token) for token in ids[-ANCHOR:] if token != self.tokenizer.document_id)
        limit = max(1, min(sampling.max_tokens, self.context_length - len(ids)))
        return [_Row(number, sample, anchor, limit) for sample in range(sampling.samples)]

    def _bucket(self, length: int) -> int:
        size = max(SHORTEST, 1 << (length - 1).bit_length())
        return min(-(-size // self._token_shards) * self._token_shards, self.context_length)

    def _run(
        self,
        prompts: dict[int, np.ndarray],
        rows: dict[int, list[_Row]],
        together: int,
        sampling: Sampling,
        drawing: Drawing,
    ) -> None:
        """All samples of a few prompts, which are read once."""
        Q = -(-together // self._shards) * self._shards
        longest = max(len(ids) for ids in prompts.values())
        tokens_QN = np.zeros((Q, self._bucket(longest)), np.int32)
        lengths_Q = np.ones(Q, np.int32)
        for place, ids in enumerate(prompts.values()):
            tokens_QN[place, : len(ids)], lengths_Q[place] = ids, len(ids)
        length = self._bucket(min(longest + sampling.max_tokens, self.context_length))
        prefilled = self._prefill(self.parameters, tokens_QN, lengths_Q, length=length)
        place_of = {number: place for place, number in enumerate(prompts)}
        samples = [row for number in prompts for row in rows[number]]
        for start in range(0, len(samples), self.batch_size):
            self._decode(prefilled, lengths_Q, place_of, samples[start : start + self.batch_size], sampling, drawing)

    def _decode(
        self,
        prefilled: tuple[jax.Array, Caches],
        lengths_Q: np.ndarray,
        place_of: dict[int, int],
        rows: list[_Row],
        sampling: Sampling,
        drawing: Drawing,
    ) -> None:
        """Extends rows, at most a batch of them, until all have ended."""
        free = self.batch_size - len(rows)  # copies of the first row, ended before they begin
        filled = rows + rows[:1] * free
        place_B = np.asarray([place_of[row.prompt] for row in filled], np.int32)
        which = {name: np.asarray([getattr(row, name) for row in filled], np.int32) for name in ("prompt", "sample")}
        seed = np.uint32(sampling.seed)
        state = self._begin(prefilled, place_B, lengths_Q[place_B], which, seed, drawing=drawing)
        drawn_BT = np.asarray(state["out"])[:, None]
        while True:
            for row, drawn in zip(rows, drawn_BT, strict=False):  # rows that fill the batch up are no samples
                if row.ended is None:
                    row.extend(drawn, sampling.stop, self.tokenizer)
            if all(row.ended for row in rows):
                return
            ended_B = np.asarray([row.ended is not None for row in rows] + [True] * free)
            left = max(row.limit - len(row.tokens) for row in rows if row.ended is None)
            steps = np.int32(min(left, TOKENS_A_CALL))
            limit_B = np.asarray([row.limit for row in filled], np.int32)
            state, out_BT = self._advance(
                self.parameters,
                state=state,
                ended_B=ended_B,
                limit_B=limit_B,
                seed=seed,
                steps=steps,
                drawing=drawing,
                document=self.tokenizer.document_id,
            )
            drawn_BT = np.asarray(out_BT)[:, :steps]


def _finished(row: _Row) -> Sample:
    assert row.ended is not None
    return Sample(row.text, tuple(row.tokens), row.ended)


def _begin(
    prefilled: tuple[jax.Array, Caches],
    place_B: jax.Array,
    lengths_B: jax.Array,
    which: dict[str, jax.Array],
    seed: jax.Array,
    drawing: Drawing,
) -> dict[str, Any]:
    """The state of a batch: each row with its prompt's cache and its first token."""
    logits_QV, caches = prefilled
    drawn_B = jnp.zeros_like(place_B)
    token_B = draw(logits_QV[place_B], keys(seed, which["prompt"], which["sample"], drawn_B), drawing)
    return which | {
        "caches": jax.tree.map(lambda x: constrain(x[place_B], "B K s d"), caches),
        "token": token_B.astype(jnp.int32),
        "position": lengths_B,
        "drawn": drawn_B + 1,
        "out": constrain(token_B, "every"),
    }


def _advance(
    config: ModelConfig,
    parameters: Parameters,
    state: dict[str, Any],
    ended_B: jax.Array,
    limit_B: jax.Array,
    seed: jax.Array,
    steps: jax.Array,
    drawing: Drawing,
    document: int,
) -> tuple[dict[str, Any], jax.Array]:
    """The next `steps` tokens of each row that has not ended, [B, T]; a row ends by `document` or its limit."""
    decoder = Decoder(config, parameters)
    out_BT = jnp.zeros((len(ended_B), TOKENS_A_CALL), jnp.int32)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, state, ended_B, out_BT = carry
        logits_BV, caches = decoder.step(state["caches"], state["token"], state["position"])
        keys_B = keys(seed, state["prompt"], state["sample"], state["drawn"])
        token_B = draw(logits_BV, keys_B, drawing).astype(jnp.int32)
        going_B = (~ended_B).astype(jnp.int32)
        state = state | {
            "caches": caches,
            "token": jnp.where(ended_B, state["token"], token_B),
            "position": state["position"] + going_B,  # one that has ended writes its last token again
            "drawn": state["drawn"] + going_B,
        }
        ended_B = ended_B | (token_B == document) | (state["drawn"] >= limit_B)
        return i + 1, state, ended_B, out_BT.at[:, i].set(token_B)

    def goes_on(carry: tuple[Any, ...]) -> jax.Array:
        return (carry[0] < steps) & ~jnp.all(carry[2])

    _, state, _, out_BT = jax.lax.while_loop(goes_on, body, (jnp.int32(0), state, ended_B, out_BT))
    return state, constrain(out_BT, "every one")
