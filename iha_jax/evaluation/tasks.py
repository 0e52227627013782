"""What a task is: a function of a model and options that returns numbers, their intervals and one record a sample."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from iha_jax.comparison.statistics import estimate
from iha_jax.evaluation.text_model import Sampling, TextModel

DATA = ("gsm8k", "math500", "mbpp", "essays", "squad", "hotpotqa", "lm_eval")  # what `Options.data` can name
# Task: where its function `(model: TextModel, options: Options) -> TaskResult` is, imported when asked for.
TASKS: dict[str, str] = {
    "loss": "iha_jax.evaluation.validation_loss:loss_task",
    "sample": "iha_jax.evaluation.sample:sample_task",
    "ruler": "iha_jax.evaluation.ruler.task:ruler",
    "gsm8k": "iha_jax.evaluation.reasoning.gsm8k:run_gsm8k",
    "math500": "iha_jax.evaluation.reasoning.math500:run_math500",
    "mbpp": "iha_jax.evaluation.reasoning.code:run_mbpp",
    "humaneval": "iha_jax.evaluation.reasoning.code:run_humaneval",
}
# The same for "prefix:<name>", whose function takes the name first.
PREFIXES: dict[str, str] = {
    "ruler": "iha_jax.evaluation.ruler.task:ruler_subtask",
    "lm_eval": "iha_jax.evaluation.harness:lm_eval_task",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says to all tasks; None leaves a value to the task."""

    data: Mapping[str, str] = field(default_factory=dict)  # one of `DATA`: where it is
    limit: int | None = None  # the first examples alone
    shots: int | None = None  # solved examples in the prompt
    samples: int | None = None  # of each prompt
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    chat: bool = False  # prompts as the user's turn of a conversation
    lengths: tuple[int, ...] = ()  # of prompts, in tokens
    allow_code_execution: bool = False
    prompt: str = "def "  # what `sample` continues
    eval_rows: int | None = None  # of `loss`; 0: all; None: as in training

    def sampling(self, default: Sampling) -> Sampling:
        """The task's own way of sampling, with what the command line says instead."""
        named = ("samples", "max_tokens", "temperature", "top_k", "top_p")
        asked = {name: getattr(self, name) for name in named if getattr(self, name) is not None}
        return Sampling(**{**vars(default), **asked, "seed": self.seed})


@dataclass(frozen=True)
class TaskResult:
    """What a task found.

    `metrics` by name, their 95 % `intervals` and how many independent `examples` each is over by the same names;
    `settings`: what was asked, the same for all that is to be compared; `records`: one JSON object a sample; `counts`:
    what happened on the way, such as prompts that were cut.
    """

    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    settings: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    examples: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)


def load_task(name: str) -> Callable[[TextModel, Options], TaskResult]:
    """The function of a task. Raises ValueError, naming all tasks, for another name."""
    prefix, colon, rest = name.partition(":")
    if colon and rest and prefix in PREFIXES:
        function = _load(PREFIXES[prefix])
        return lambda model, options: function(rest, model, options)
    if name not in TASKS:
        known = ", ".join([*TASKS, *(f"{prefix}:<name>" for prefix in PREFIXES)])
        raise ValueError(f"no task {name!r}; expected some of {known}")
    return _load(TASKS[name])


def _load(place: str) -> Callable[..., TaskResult]:
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean over independent examples, such as accuracies of problems (Student t).

    Of several samples of a problem take their mean first: samples of one problem are not independent. Where all values
    are 0 or all are 1 they have no spread, and the interval is Wilson's for 0 or n successes of n. NaN for one other
    value.
    """
    n = len(values)
    found = estimate(values)
    if all(value == values[0] for value in values) and values[0] in (0, 1):
        z2 = 1.959963984540054**2
        far = z2 / (n + z2)
        return (0.0, far) if values[0] == 0 else (1 - far, 1.0)
    if found.half_width is None:
        return (math.nan, math.nan)
    return (found.mean - found.half_width, found.mean + found.half_width)
