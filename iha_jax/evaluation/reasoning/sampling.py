"""What the four tasks share: how they sample, how a prompt becomes a conversation, one record a sample."""

from collections.abc import Sequence
from typing import Any

from iha_jax.evaluation.tasks import Options, TaskResult
from iha_jax.evaluation.text_model import Completion, Sampling, TextModel

# How the paper samples after fine-tuning: --samples=16 --temperature=0.6. The tasks' default is one greedy sample.
PAPER_SAMPLING = Sampling(temperature=0.6, samples=16)

Shot = tuple[str, str]  # what is asked, what is answered


def shot_count(task: str, options: Options, published: int) -> int:
    """Solved examples in a prompt: all published ones, none in a conversation, or what `options.shots` says.

    Raises ValueError for more than are published.
    """
    shots = (0 if options.chat else published) if options.shots is None else options.shots
    if not 0 <= shots <= published:
        raise ValueError(f"shots = {shots}: task {task} has {published} published examples; expected 0 to {published}")
    return shots


def sampling_of(task: str, options: Options, *, max_tokens: int, stop: Sequence[str]) -> Sampling:
    """One greedy sample unless the options say otherwise; a conversation ends where the turn does.

    Raises ValueError for several samples at temperature 0, which are all the same.
    """
    if options.chat:
        from iha_jax.data.chat import END_OF_TURN

        stop = (END_OF_TURN,)
    sampling = options.sampling(Sampling(max_tokens=max_tokens, stop=tuple(stop)))
    if sampling.samples < 1:
        raise ValueError(f"samples = {sampling.samples}: expected at least 1")
    if sampling.samples > 1 and sampling.temperature == 0:
        raise ValueError(
            f"task {task}: {sampling.samples} samples at temperature 0 are all the same; "
            f"set a temperature, such as the paper's {PAPER_SAMPLING.temperature}"
        )
    return sampling


def conversation(shots: Sequence[Shot], question: str) -> str:
    """The text of a conversation: the examples as turns before the question."""
    from iha_jax.data.chat import prompt_text

    messages = []
    for asked, answered in shots:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return prompt_text([*messages, {"role": "user", "content": question}])


def complete(model: TextModel, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
    """The completions, as many as asked for. Raises RuntimeError where a model returns another number."""
    found = model.complete(prompts, sampling)
    if len(found) != len(prompts) or any(len(one.samples) != sampling.samples for one in found):
        raise RuntimeError(f"the model did not return {sampling.samples} samples of each of {len(prompts)} prompts")
    return found


def records_of(
    ids: Sequence[Any], completions: Sequence[Completion], seed: int, judged: Sequence[Sequence[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """One record a sample; `judged[problem][sample]` has what the task found in it: extracted, correct, ..."""
    return [
        {
            "problem": problem,
            "sample": number,
            "seed": seed,
            "text": sample.text,
            **found,
            "ended": sample.ended,
            "dropped_tokens": completion.dropped_tokens,
        }
        for problem, completion, row in zip(ids, completions, judged, strict=True)
        for number, (sample, found) in enumerate(zip(completion.samples, row, strict=True))
    ]


def result_of(
    metrics: tuple[dict[str, float], dict[str, tuple[float, float]]],
    settings: dict[str, Any],
    sampling: Sampling,
    completions: Sequence[Completion],
    records: list[dict[str, Any]],
    **counts: int,
) -> TaskResult:
    """With what every task says of its run: sampling, problems, prompts cut, samples that never stopped."""
    sampled = {"problems": len(completions), "sampling": {**vars(sampling), "stop": list(sampling.stop)}}
    counts |= {
        "prompts_truncated": sum(one.dropped_tokens > 0 for one in completions),
        "samples_cut_at_max_tokens": sum(sample.ended == "length" for one in completions for sample in one.samples),
    }
    examples = dict.fromkeys(metrics[0], len(completions))
    return TaskResult(*metrics, {**settings, **sampled}, records, examples, counts)
