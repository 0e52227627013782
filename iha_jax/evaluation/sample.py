"""A look at what a model writes."""

from iha_jax.evaluation.tasks import Options, TaskResult
from iha_jax.evaluation.text_model import Sampling, TextModel

DEFAULT = Sampling(max_tokens=100, temperature=0.8)


def sample_task(model: TextModel, options: Options) -> TaskResult:
    """Continuations of `options.prompt`, which is taken as the beginning of a document. It has no metrics."""
    sampling = options.sampling(DEFAULT)
    [completion] = model.complete([options.prompt], sampling)
    records = [
        {"prompt": options.prompt, "continuation": s.text, "tokens": len(s.tokens), "ended": s.ended}
        for s in completion.samples
    ]
    return TaskResult({}, {}, {"sampling": vars(sampling), "dropped_tokens": completion.dropped_tokens}, records)
