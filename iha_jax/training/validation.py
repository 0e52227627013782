"""What is measured at every evaluation: validation loss, bits per byte, IHA's diagnostics; of retrieval, accuracy."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from iha_jax.config import Config
from iha_jax.data.batches import validation_batches
from iha_jax.data.corpus import Corpus
from iha_jax.data.retrieval import is_retrieval
from iha_jax.evaluation.perplexity import evaluate
from iha_jax.evaluation.retrieval import Retrieval
from iha_jax.parallel.mesh import batch_shards
from iha_jax.training.diagnostics import make_diagnostics
from iha_jax.training.step import jit_eval_step


class Validation:
    """`Validation(config, corpus, mesh)(parameters)` gives the numbers of one `val` row, always on the same rows."""

    def __init__(self, config: Config, corpus: Corpus, mesh: Mesh, before_batch: Callable[[], None]):
        self._config, self._corpus, self._mesh, self._before_batch = config, corpus, mesh, before_batch
        self._eval_step = jit_eval_step(config, mesh)
        self._diagnostics = make_diagnostics(config)
        self._retrieval: Callable[[Any], dict[str, float]] = lambda _: {}
        if is_retrieval(source := config.data.sources[0]):
            self._retrieval = Retrieval(config, corpus.tokenizer, mesh, source)

    def __call__(self, parameters: Any) -> dict[str, float]:
        training = self._config.training

        def eval_step(*arguments: Any) -> Any:
            self._before_batch()
            return self._eval_step(*arguments)

        sums = evaluate(
            eval_step,
            parameters,
            self._corpus.validation,
            self._corpus.tokenizer.byte_lengths,
            self._mesh,
            batch_size=training.eval_batch_size,
            num_rows=training.eval_rows or None,
        )
        first = next(iter(validation_batches(self._corpus.validation, batch_size=1, num_rows=1)))
        # The same row on every shard of the batch: what is found must not depend on the mesh.
        row = {name: np.repeat(x, batch_shards(self._mesh), axis=0) for name, x in first.items()}
        found = self._diagnostics(parameters, row["inputs"], row["segment_ids"])
        numbers = {"loss": sums.loss, "bits_per_byte": sums.bits_per_byte}
        return numbers | {name: float(value) for name, value in found.items()} | self._retrieval(parameters)
