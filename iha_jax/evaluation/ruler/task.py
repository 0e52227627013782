"""The task `ruler`, and `ruler:<subtask>`: samples of exact lengths, greedy answers, scores."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from absl import logging

from iha_jax.data.tokenizers import Tokenizer
from iha_jax.evaluation.ruler.chain import chain
from iha_jax.evaluation.ruler.definition import (
    DEFAULT_LENGTH,
    SUBTASKS,
    Chain,
    CodedText,
    Documents,
    Needles,
    Subtask,
    WordList,
)
from iha_jax.evaluation.ruler.documents import documents
from iha_jax.evaluation.ruler.frequencies import coded_text, word_list
from iha_jax.evaluation.ruler.length import largest_fitting
from iha_jax.evaluation.ruler.material import Material, load_material, missing
from iha_jax.evaluation.ruler.needles import needles
from iha_jax.evaluation.ruler.sample import Draw, Growing, Sample
from iha_jax.evaluation.ruler.scoring import average_interval, string_match
from iha_jax.evaluation.tasks import Options, TaskResult, mean_interval
from iha_jax.evaluation.text_model import Sampling, TextModel

GENERATORS: dict[type, Callable[[Any, Draw], Growing]] = {
    Needles: needles,
    Chain: chain,
    WordList: word_list,
    CodedText: coded_text,
    Documents: documents,
}
SAMPLES, PUBLISHED_SAMPLES = 100, 500
VARIANT = "_variant"
SEPARATOR = 1  # the token before every prompt


class DoesNotFitError(ValueError):
    """The smallest prompt of a subtask is longer than the length; the message says what it needs."""


@dataclass(frozen=True)
class Sized:
    """A sample with the most haystack for its length: `size` units of it, and the tokens of its prompt."""

    sample: Sample
    prompt: str
    prompt_tokens: int
    size: int
    index: int


def ruler(model: TextModel, options: Options) -> TaskResult:
    """All 13 subtasks at every length of `options.lengths` (default: 4096, 8192, ... up to the model's context).

    Metrics are named `<subtask>/<length>`, and `average/<length>` over all 13, `average_of_<n>/<length>` where not all
    ran; what is not the published text has `_variant` after the name. Intervals of averages take subtasks as
    independent. `settings["skipped"]` says what did not run, and why.

    Raises:
      ValueError: for a length beyond the model's context, files that cannot be used, and where nothing can run.
    """
    absent = {name: task.dataset for name, task in SUBTASKS.items() if isinstance(task, Documents)}
    skipped = {name: missing(dataset) for name, dataset in absent.items() if dataset not in options.data}
    return _evaluate([name for name in SUBTASKS if name not in skipped], model, options, skipped)


def ruler_subtask(name: str, model: TextModel, options: Options) -> TaskResult:
    """One of the 13, as `ruler:niah_single_1`. Raises ValueError as `ruler` does, and for another name."""
    if name not in SUBTASKS:
        raise ValueError(f"no RULER task {name!r}; expected one of {', '.join(SUBTASKS)}")
    return _evaluate([name], model, options, {})


def samples(
    name: str,
    length: int,
    tokenizer: Tokenizer,
    material: Material,
    *,
    seed: int = 0,
    max_tokens: int | None = None,
    frame: Callable[[Sample], str] = lambda sample: sample.prompt,
) -> Iterator[Sized]:
    """The samples of a subtask in order, each as long as fits: without end, but for questions, which are a file's.

    `1 + tokens(frame(sample)) + max_tokens <= length`, and one more unit of haystack would exceed it. `max_tokens`
    is the published number by default. Samples depend on all arguments and on nothing else.

    Raises:
      DoesNotFitError: where the smallest prompt is too long (questions whose documents are too long are left out).
    """
    task = SUBTASKS[name]
    reserved = SEPARATOR + (task.wording.max_tokens if max_tokens is None else max_tokens)
    questions = len(material.questions[task.dataset].questions) if isinstance(task, Documents) else None
    guess = None

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text))

    for index in itertools.count() if questions is None else range(questions):
        draw = Draw(name, length, index, seed, tokens, material)
        try:
            growing = GENERATORS[type(task)](task, draw)
        except ValueError as error:
            raise DoesNotFitError(str(error)) from error
        texts: dict[int, tuple[Sample, str, int]] = {}

        def count(size: int, growing: Growing = growing, draw: Draw = draw, texts: dict[int, Any] = texts) -> int:
            sample = growing.at(size)
            prompt = frame(sample)
            texts[size] = sample, prompt, draw.count(prompt)
            return texts[size][2]

        size = largest_fitting(count, length - reserved, growing.minimum, guess)
        if size is not None:
            guess = size
            yield Sized(*texts[size], size, index)
        elif questions is None:
            raise DoesNotFitError(f"needs {texts[growing.minimum][2] + reserved} tokens at least")


@dataclass
class _Results:
    """What has been found so far; the fields are those of the result."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, int] = field(default_factory=dict)
    questions_left_out: dict[str, int] = field(default_factory=dict)

    def add(self, metric: str, rows: list[dict[str, Any]]) -> None:
        scores = [row["score"] for row in rows]
        self.metrics[metric] = math.fsum(scores) / len(scores)
        self.intervals[metric] = mean_interval(scores)
        self.samples[metric] = len(rows)
        self.records += rows
        logging.info("ruler: %s %.3f (n=%d)", metric, self.metrics[metric], len(rows))

    def add_average(self, length: int) -> None:
        """Over the subtasks of a length, where there are several."""
        means = {name: mean for name, mean in self.metrics.items() if name.endswith(f"/{length}")}
        if len(means) < 2:
            return
        name = "average" if len(means) == len(SUBTASKS) else f"average_of_{len(means)}"
        metric = f"{name}{VARIANT if any(VARIANT in name for name in means) else ''}/{length}"
        self.metrics[metric] = math.fsum(means.values()) / len(means)
        self.intervals[metric] = average_interval(means, self.intervals)


def _evaluate(names: Sequence[str], model: TextModel, options: Options, skipped: dict[str, str]) -> TaskResult:
    lengths = _lengths(model.context_length, options.lengths)
    material = load_material(frozenset(need for name in names for need in SUBTASKS[name].needs), options.data)
    variants = {
        name: found for name in names if (found := sorted(material.variants.intersection(SUBTASKS[name].needs)))
    }
    samplings = {name: _sampling(SUBTASKS[name], options) for name in names}
    results = _Results()
    for length in lengths:
        for name in names:
            metric = f"{name}{VARIANT if name in variants else ''}/{length}"
            try:
                drawn = _draw(name, length, model.tokenizer, material, options, samplings[name].max_tokens)
            except DoesNotFitError as error:
                skipped[metric] = str(error)
                continue
            if isinstance(task := SUBTASKS[name], Documents):
                limit = SAMPLES if options.limit is None else options.limit
                seen = drawn[-1].index + 1 if len(drawn) == limit else len(material.questions[task.dataset].questions)
                results.questions_left_out[metric] = seen - len(drawn)
            results.add(metric, _answer(metric, drawn, model, samplings[name], SUBTASKS[name].wording.any_answer))
        results.add_average(length)
    if not results.metrics:
        raise ValueError("no RULER task can run: " + "; ".join(f"{name} {why}" for name, why in skipped.items()))
    truncated = sum(record["dropped_tokens"] > 0 for record in results.records)
    settings = {
        "lengths": lengths,
        "samples": SAMPLES if options.limit is None else options.limit,
        "published_samples": PUBLISHED_SAMPLES,
        "seed": options.seed,
        "chat": options.chat,
        "sampling": {name: vars(sampling) for name, sampling in samplings.items()},
        "material": dict(material.facts),
        "variants": variants,
        "skipped": skipped,
        "tokenizer": {"spec": model.tokenizer.spec, "digest": model.tokenizer.digest},
    }
    counts = {"questions_left_out": results.questions_left_out, "prompts_truncated": truncated}
    return TaskResult(results.metrics, results.intervals, settings, results.records, results.samples, counts)


def _lengths(context: int, asked: Sequence[int]) -> list[int]:
    """Raises ValueError for lengths that the model cannot see."""
    wrong = [length for length in asked if not 0 < length <= context]
    if wrong:
        raise ValueError(f"lengths {wrong}: expected 1 to {context}, the model's context in tokens")
    if asked:
        return sorted(set(asked))
    powers = itertools.takewhile(lambda length: length <= context, (DEFAULT_LENGTH << i for i in itertools.count()))
    return list(powers) or [context]


def _sampling(task: Subtask, options: Options) -> Sampling:
    if not options.chat:
        return options.sampling(Sampling(max_tokens=task.wording.max_tokens))
    from iha_jax.data.chat import END_OF_TURN

    return options.sampling(Sampling(max_tokens=task.wording.max_tokens, stop=(END_OF_TURN,)))


def _in_conversation(sample: Sample) -> str:
    from iha_jax.data.chat import prompt_text

    return prompt_text([{"role": "user", "content": sample.question}]) + sample.answer_prefix


def _draw(
    name: str, length: int, tokenizer: Tokenizer, material: Material, options: Options, max_tokens: int
) -> list[Sized]:
    """Raises DoesNotFitError for a subtask without a sample that fits, ValueError for a limit below 1."""
    limit = SAMPLES if options.limit is None else options.limit
    if limit < 1:
        raise ValueError(f"limit = {limit}: expected at least 1 sample of each task")
    frame = _in_conversation if options.chat else lambda sample: sample.prompt
    drawn = samples(name, length, tokenizer, material, seed=options.seed, max_tokens=max_tokens, frame=frame)
    found = list(itertools.islice(drawn, limit))
    if not found:
        raise DoesNotFitError("has no question whose own documents fit")
    return found


def _answer(
    metric: str, drawn: Sequence[Sized], model: TextModel, sampling: Sampling, any_answer: bool
) -> list[dict[str, Any]]:
    task, length = metric.rsplit("/", 1)
    rows = []
    for sized, completion in zip(drawn, model.complete([sized.prompt for sized in drawn], sampling), strict=True):
        outputs = [sample.text for sample in completion.samples]
        scores = [string_match(output, sized.sample.answers, any_answer) for output in outputs]
        rows.append(
            {
                "task": task,
                "length": int(length),
                "index": sized.index,
                "prompt_tokens": sized.prompt_tokens,
                "haystack": sized.size,
                "expected": list(sized.sample.answers),
                "outputs": outputs,
                "ended": [sample.ended for sample in completion.samples],
                "score": math.fsum(scores) / len(scores),
                "dropped_tokens": completion.dropped_tokens,
            }
        )
    return rows
