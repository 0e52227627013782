"""How likely a continuation is, from full forward passes: fixed batch sizes and few lengths, so few compilations.

Shapes: B rows of a batch, N tokens, C tokens of a row whose logits exist at a time, V vocabulary.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from iha_jax.array_types import Array
from iha_jax.config import ModelConfig
from iha_jax.evaluation.text_model import Score, TextModel
from iha_jax.model import Transformer, bind
from iha_jax.parallel.mesh import batch_shards, local_rows, place_batch, replicated
from iha_jax.parallel.rules import shards
from iha_jax.training.loss import chunked, joined

Request = tuple[np.ndarray, np.ndarray]  # token ids of a context and of its continuation
_SHORTEST = 64  # tokens of the shortest rows; longer rows have 2, 4, 8, ... times as many
_CHUNK = 512  # tokens of a row whose logits exist at a time


class Scorer:
    """`score` of `TextModel` for a trained model.

    The model sees the last `context_length` tokens of separator + context + continuation without its last token: what
    does not fit is cut off on the left, the document separator first. Rows are padded on the right, which causal
    attention does not see, to one of a few lengths, and batches have always `batch_size` rows, split over the mesh.
    """

    def __init__(self, config: ModelConfig, parameters: dict, document_id: int, mesh: Mesh, *, batch_size: int = 8):
        """`document_id`: the tokenizer's document separator. Every process of the mesh makes the same calls.

        Raises:
          ValueError: for a bidirectional model, or a batch size that the mesh does not divide.
        """
        if not config.causal:
            raise ValueError(
                "config.model.causal = False: a bidirectional model has no next token; expected a causal one"
            )
        ways = batch_shards(mesh)
        if batch_size < 1 or batch_size % ways:
            raise ValueError(
                f"batch_size = {batch_size}: does not divide over the {ways} shards of data and fsdp; choose a "
                f"multiple of {ways}"
            )
        self._config, self._parameters, self._mesh, self._document = config, parameters, mesh, document_id
        self._batch_size = batch_size
        self._lengths = row_lengths(config.context_length, mesh.shape["context"] * mesh.shape["tensor"])
        self._here = local_rows(mesh, batch_size)
        self._forward = jax.jit(functools.partial(_token_scores, config), out_shardings=replicated(mesh))

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Scores in the order of `requests`. Nats, summed in float64 from float32 terms; 0 for an empty continuation.

        `is_greedy`: at every token of the continuation no other token is likelier (of equals the lowest id counts).

        Raises:
          ValueError: for a continuation longer than the context, or a token outside the vocabulary.
        """
        rows = [self._row(i, *request) for i, request in enumerate(requests)]
        scores: list[Score] = [Score(0.0, True, dropped) for _, _, dropped in rows]
        for length in self._lengths:
            shorter = max((n for n in self._lengths if n < length), default=0)
            chosen = [i for i, (tokens, count, _) in enumerate(rows) if count and shorter < len(tokens) - 1 <= length]
            for start in range(0, len(chosen), self._batch_size):
                batch = chosen[start : start + self._batch_size]
                log_p_BN, likeliest_BN = self._run([rows[i][0] for i in batch], length)
                for i, log_p_N, likeliest_N in zip(batch, log_p_BN, likeliest_BN, strict=False):
                    tokens, count, dropped = rows[i]
                    told = slice(len(tokens) - 1 - count, len(tokens) - 1)
                    scores[i] = Score(
                        math.fsum(log_p_N[told].tolist()), bool((likeliest_N[told] == tokens[-count:]).all()), dropped
                    )
        return scores

    def _row(self, i: int, context: np.ndarray, continuation: np.ndarray) -> tuple[np.ndarray, int, int]:
        """The tokens that the model sees and is asked for, how many are asked for, and context tokens cut off."""
        N, count = self._config.context_length, len(continuation)
        if count > N:
            raise ValueError(
                f"request {i}: the continuation has {count} tokens, more than the context of {N}; cut it into windows"
            )
        asked = np.concatenate([np.asarray(context, np.int64), np.asarray(continuation, np.int64)])
        outside = asked[(asked < 0) | (asked >= self._config.vocab_size)]
        if len(outside):
            raise ValueError(f"request {i} has token {outside[0]}; expected ids below {self._config.vocab_size}")
        tokens = np.concatenate([[self._document], asked])[-(N + 1) :].astype(np.int32)
        return tokens, count, max(0, len(context) - (len(tokens) - count))

    def _run(self, rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
        inputs_BN = np.zeros((self._batch_size, length), np.int32)
        targets_BN = np.zeros((self._batch_size, length), np.int32)
        for row, tokens in enumerate(rows):
            inputs_BN[row, : len(tokens) - 1], targets_BN[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        batch = {"inputs": inputs_BN[self._here], "targets": targets_BN[self._here]}
        with jax.set_mesh(self._mesh):
            placed = place_batch(batch, self._mesh, self._batch_size)
            return jax.device_get(self._forward(self._parameters, placed["inputs"], placed["targets"]))


def row_lengths(context_length: int, unit: int) -> list[int]:
    """The lengths that rows are padded to: 64, 128, 256, ... in multiples of `unit`, and last the whole context."""
    doubled = [_SHORTEST << i for i in range(context_length.bit_length())]
    return sorted({min(context_length, -(-length // unit) * unit) for length in doubled})


def rolling_windows(tokens: np.ndarray, context_length: int) -> Iterator[Request]:
    """A text of any length as requests that predict each token once, `context_length` at a time.

    Windows do not overlap, except that the last one of several begins earlier, to see a whole context too. The first
    begins with the document separator; the others see no separator, since their rows are full.
    """
    N = context_length
    for start in range(0, len(tokens), N):
        stop = min(start + N, len(tokens))
        yield tokens[max(0, stop - N - 1) : start], tokens[start:stop]


def rolling_log_likelihoods(model: TextModel, texts: Sequence[np.ndarray]) -> list[float]:
    """ln p of each text (token ids) as one document, in nats, by `rolling_windows`; 0 for an empty text."""
    windows = [list(rolling_windows(text, model.context_length)) for text in texts]
    scores = iter(model.score([window for of_text in windows for window in of_text]))
    return [math.fsum(next(scores).log_likelihood for _ in of_text) for of_text in windows]


def _token_scores(config: ModelConfig, parameters: dict, inputs_BN: Array, targets_BN: Array) -> tuple[Array, Array]:
    """ln p(target) [B, N] float32 of every token, and the likeliest token [B, N]."""
    model = bind(config, parameters)
    N = inputs_BN.shape[1]
    devices = shards("N")
    parts = next(n for n in range(1, N + 1) if N // devices % n == 0 and (N // n <= _CHUNK or n == N // devices))
    chunks = chunked(model.hidden(inputs_BN), N // parts), chunked(targets_BN, N // parts)
    log_p, likeliest = jax.lax.map(lambda chunk: _chunk_scores(model, *chunk), chunks)
    return joined(log_p), joined(likeliest)


def _chunk_scores(model: Transformer, hidden_BCD: Array, targets_BC: Array) -> tuple[Array, Array]:
    logits_BCV = model.logits(hidden_BCD)
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return target_BC - jax.nn.logsumexp(logits_BCV, axis=-1), jnp.argmax(logits_BCV, axis=-1)
