"""A trained model of a run directory, as tasks see it."""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from iha_jax.config import Config
from iha_jax.data.corpus import open_tokenizer
from iha_jax.data.tokenizers import Tokenizer
from iha_jax.evaluation.text_model import Completion, Sampling, Score
from iha_jax.parallel.mesh import batch_shards, mesh_for_evaluation
from iha_jax.parallel.processes import agree
from iha_jax.training.checkpoint import Checkpointer
from iha_jax.training.fingerprint import tree_digest
from iha_jax.training.run_directory import common_facts, load_run_config
from iha_jax.training.state import abstract_parameters_on

if TYPE_CHECKING:  # what generating and scoring need is imported by tasks that do so
    from iha_jax.evaluation.decoding.generator import Generator
    from iha_jax.evaluation.scoring import Scorer


@dataclass(frozen=True)
class Restored:
    """A run's config and the parameters of one of its steps, with the digest of their values."""

    config: Config
    parameters: Any
    step: int
    mesh: Mesh
    digest: str


def restore(workdir: str, step: int | None) -> Restored:
    """The parameters of a run's `step`, or of its last, on the run's mesh if it fits the devices that are here.

    Raises:
      ValueError: in every process when in one, for a directory that is no run, a step it does not have, or parameters
        that do not fit its config or are not what was saved.
    """
    config = agree(lambda: load_run_config(workdir), lambda config: common_facts(config, workdir))
    mesh = mesh_for_evaluation(config.mesh)
    with Checkpointer(epath.Path(workdir) / "checkpoints", writable=False) as checkpoints:

        def choose() -> int:
            found = step if step is not None else checkpoints.latest_step()
            if found is None:
                raise ValueError(f"--workdir={workdir}: the run has no checkpoint yet")
            return found

        found = agree(choose, lambda found: {f"step of --workdir={workdir}": found})
        parameters = checkpoints.restore_parameters(abstract_parameters_on(config, mesh), found)
    return Restored(config, parameters, found, mesh, tree_digest(parameters))


class RunModel:
    """A `TextModel` of a restored run.

    `batch_size` rows are generated or scored at once. Of prompts and contexts too long for the model the left end is
    left out, and counted; with `too_long="refuse"` they are refused.
    """

    def __init__(self, run: Restored, *, batch_size: int = 16, too_long: str = "truncate"):
        self.run = run
        self.tokenizer: Tokenizer = open_tokenizer(run.config)
        self.context_length = run.config.model.context_length
        self._options: dict[str, Any] = {"mesh": run.mesh, "batch_size": batch_size, "too_long": too_long}

    @functools.cached_property
    def _generator(self) -> "Generator":
        from iha_jax.evaluation.decoding.generator import Generator

        return Generator(self.run.config.model, self.run.parameters, self.tokenizer, **self._options)

    @functools.cached_property
    def _scorer(self) -> "Scorer":
        from iha_jax.evaluation.scoring import Scorer

        shards = batch_shards(self.run.mesh)
        batch_size = -(-self._options["batch_size"] // shards) * shards
        model, document_id = self.run.config.model, self.tokenizer.document_id
        return Scorer(model, self.run.parameters, document_id, self.run.mesh, batch_size=batch_size)

    def complete(self, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
        _same_everywhere({"prompts": list(prompts), "sampling": vars(sampling)})
        return self._generator.complete(prompts, sampling)

    def score(self, requests: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Score]:
        for number, (context, continuation) in enumerate(requests):
            # The last token is predicted, not seen.
            if self._options["too_long"] == "refuse" and len(context) + len(continuation) > self.context_length + 1:
                raise ValueError(
                    f"request {number} has {len(context)} + {len(continuation)} tokens, of which the model would see "
                    f"the last {self.context_length + 1}"
                )
        _same_everywhere({"requests": [[x.tolist() for x in map(np.asarray, request)] for request in requests]})
        return self._scorer.score(requests)


def _same_everywhere(asked: dict[str, Any]) -> None:
    """Raises Disagreement where processes ask for something else, or one has refused: else they would wait for it."""

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()

    agree(lambda: None, lambda _: {name: digest(value) for name, value in asked.items()})
