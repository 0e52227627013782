"""How many values a model of generated retrieval (`data/retrieval.py`) gets right, by length of the text.

Teacher forced: an answer is right when every token of it is the likeliest one after the tokens before it, so one
forward pass answers all queries of a batch, as greedy decoding of each alone would.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from iha_jax.config import Config
from iha_jax.data.batches import validation_batches
from iha_jax.data.retrieval import RetrievalRows, evaluation_lengths
from iha_jax.data.tokenizers import Tokenizer
from iha_jax.model import bind
from iha_jax.parallel.mesh import local_rows, place_batch
from iha_jax.training.step import attended_segments

KEYS = ("trained", "held_out")


def metric_name(keys: str, length: int) -> str:
    """Of validation rows: `exact_trained_256`, `exact_held_out_1024`, ..."""
    return f"exact_{keys}_{length}"


def make_exact_step(config: Config) -> Callable[[Any, Any], tuple[jax.Array, jax.Array]]:
    """Returns `step(parameters, batch) -> (answers that are right, answers)`, int32, over the whole batch.

    An answer is a run of counted targets; it is right when the argmax of the logits is the target at all of them.
    """

    def step(parameters: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        segment_ids = attended_segments(config, batch["segment_ids"])
        found_BN = bind(config.model, parameters)(batch["inputs"], segment_ids).argmax(-1)
        counted_BN = batch["loss_mask"] > 0
        before_BN = jnp.pad(counted_BN, ((0, 0), (1, 0)))[:, :-1]
        wrong_BN = jnp.cumsum(counted_BN & (found_BN != batch["targets"]), axis=1)
        first_BN = counted_BN & ~before_BN
        last_BN = counted_BN & ~jnp.pad(counted_BN, ((0, 0), (0, 1)))[:, 1:]
        # Wrong tokens before the run that a token is in, carried along from its first one.
        carried_BN = jnp.where(first_BN, jnp.pad(wrong_BN, ((0, 0), (1, 0)))[:, :-1], 0)
        carried_BN = jax.lax.cummax(carried_BN, axis=1)
        return jnp.sum(last_BN & (wrong_BN == carried_BN)), jnp.sum(last_BN)

    return step


class Retrieval:
    """`Retrieval(config, tokenizer, mesh, source)(parameters)`: the share of right answers of every length, for keys
    that were trained and keys that were held out, by `metric_name`; always on the same `training.eval_rows` texts."""

    def __init__(self, config: Config, tokenizer: Tokenizer, mesh: Mesh, source: str):
        self._config, self._mesh = config, mesh
        self._step = jax.jit(make_exact_step(config))
        self._rows = {
            (keys, length): RetrievalRows(source, keys, tokenizer, length)
            for length in evaluation_lengths(config.model.context_length)
            for keys in KEYS
        }

    def __call__(self, parameters: Any) -> dict[str, float]:
        training, found = self._config.training, {}
        size = training.eval_batch_size
        for (keys, length), rows in self._rows.items():
            here, right, asked = local_rows(self._mesh, size), 0, 0
            count = training.eval_rows or len(rows)
            for batch in validation_batches(rows, batch_size=size, num_rows=count, local_rows=here):
                sums = jax.device_get(self._step(parameters, place_batch(batch, self._mesh, size)))
                right, asked = right + int(sums[0]), asked + int(sums[1])
            found[metric_name(keys, length)] = right / asked
        return found
