"""A look at what a model writes."""

from dataclasses import replace

from iha_jax.evaluation.tasks import Options, TaskResult
from iha_jax.evaluation.text_model import Sampling, TextModel

DEFAULT = Sampling(max_tokens=100, temperature=0.8)


def sample_task(model: TextModel, options: Options) -> TaskResult:
    """Continuations of `options.prompt` as the beginning of a document, or answers to it in a conversation. It has no
    metrics."""
    sampling, prompt = options.sampling(DEFAULT), options.prompt
    if options.chat:
        from iha_jax.data.chat import END_OF_TURN, prompt_text

        sampling, prompt = replace(sampling, stop=(END_OF_TURN,)), prompt_text([{"role": "user", "content": prompt}])
    [completion] = model.complete([prompt], sampling)
    records = [
        {"prompt": options.prompt, "continuation": s.text, "tokens": len(s.tokens), "ended": s.ended}
        for s in completion.samples
    ]
    settings = {"sampling": vars(sampling), "chat": options.chat}
    return TaskResult({}, {}, settings, records, counts={"dropped_tokens": completion.dropped_tokens})
