"""Tasks of lm-evaluation-harness on a trained model: `eval.py --tasks=lm_eval:<task>`."""

import difflib
import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata, util
from typing import Any

from iha_jax.evaluation.tasks import Options, TaskResult, mean_interval
from iha_jax.evaluation.text_model import Sampling, TextModel

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_RESAMPLES = 1000  # of the bootstrap, for metrics whose standard error has no formula
_LOGGED = ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics")


def lm_eval_task(name: str, model: TextModel, options: Options) -> TaskResult:
    """Runs a task or group of the harness, or one from the YAML files below the folder `options.data["lm_eval"]`.

    Metrics are named as the harness names them, with the filter where there is one ("exact_match,strict-match"), and
    for a group with the task in front ("task/acc"). The interval of a mean over examples is `mean_interval`; another
    metric's is its value plus or minus 1.96 of the harness's standard errors, NaN where it gives none.

    Raises:
      ValueError: without the harness; for an unknown task, naming near ones; for data that is not there, options that
        make no sense here, or a task that runs the code it is given.
    """
    if util.find_spec("lm_eval") is None:
        raise ValueError("tasks lm_eval:<task> need a library that is not installed: pip install 'iha_jax[eval]'")
    _check(options)
    from iha_jax.evaluation.harness_model import HarnessModel

    def adjust(how: Sampling) -> Sampling:
        return options.sampling(how)

    adapter = HarnessModel(model, adjust=adjust, chat=options.chat)
    found = _evaluate(name, adapter, options)
    metrics, intervals, examples = {}, {}, {}
    several = len(found["results"]) > 1
    for task, results in found["results"].items():
        samples = found["samples"].get(task, [])
        for key, metric, filter_name in _metrics(results):
            label = (f"{task}/" if several else "") + metric + ("" if filter_name == "none" else f",{filter_name}")
            error = results.get(f"{metric}_stderr,{filter_name}")
            metrics[label] = float(results[key])
            examples[label] = len({sample["doc_id"] for sample in samples})
            intervals[label] = _interval(metrics[label], error, _values(samples, metric, filter_name))
    settings = {
        "task": name,
        "versions": dict(found["versions"]),
        "lm_eval": metadata.version("lm_eval"),
        "shots": dict(found["n-shot"]),
        "examples": dict(found["n-samples"]),
        "limit": options.limit,
        "seed": options.seed,
        "chat": options.chat,
    }
    counts = {"cut_requests": adapter.cut_requests, "dropped_tokens": adapter.dropped_tokens}
    records = [record for task, samples in found["samples"].items() for record in _records(task, samples)]
    return TaskResult(metrics, intervals, _plain(settings), records, examples, counts)


def _check(options: Options) -> None:
    if options.samples not in (None, 1):
        raise ValueError(f"samples = {options.samples}: a task of lm_eval says itself how many it takes (repeats)")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit = {options.limit}: expected at least 1")
    folder = options.data.get("lm_eval")
    if folder is not None and not os.path.isdir(folder):
        raise ValueError(f"data lm_eval = {folder}: no such folder; expected one with the YAML files of tasks")


def _evaluate(name: str, adapter: Any, options: Options) -> Mapping[str, Any]:
    import lm_eval  # pyright: ignore[reportMissingImports]

    evaluate: Any = lm_eval.simple_evaluate
    manager = _task_manager(name, options.data.get("lm_eval"))
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the bootstrap would fork this process, which has threads
    try:
        return evaluate(
            model=adapter,
            tasks=[name],
            num_fewshot=options.shots,
            limit=options.limit,
            apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat,
            bootstrap_iters=_RESAMPLES,
            task_manager=manager,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )
    except OSError as error:  # a hub that is not reached, a file that is not there
        raise ValueError(f"lm_eval:{name}: its data cannot be read: {error}") from error
    except ValueError as error:
        if "marked as unsafe" in str(error):
            raise ValueError(
                f"lm_eval:{name} would run the model's code without a sandbox; expected the tasks humaneval and mbpp"
            ) from error
        raise


def _task_manager(name: str, folder: str | None) -> Any:
    """Where the task is found. The harness's own thousands of tasks take seconds to read: only when needed."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    if folder is not None:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if name in manager.all_subtasks:
            return manager
    manager = TaskManager(include_path=folder)
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
        hint = f"near ones: {', '.join(near)}" if near else "expected a task's name, such as arc_easy"
        raise ValueError(f"lm_eval has no task {name!r}; {hint}")
    return manager


def _metrics(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(key, metric, filter) of every number that is not a standard error."""
    for key, value in results.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, numbers.Real):
            yield key, metric, filter_name


def _values(samples: Sequence[Mapping[str, Any]], metric: str, filter_name: str) -> list[float]:
    """The metric of every example, none where it is not a number for each."""
    values = [sample.get(metric) for sample in samples if sample["filter"] == filter_name]
    told = [float(x) for x in values if isinstance(x, numbers.Real)]
    return told if len(told) == len(values) else []


def _interval(value: float, error: Any, values: Sequence[float]) -> tuple[float, float]:
    if values and math.isclose(math.fsum(values) / len(values), value, rel_tol=1e-9, abs_tol=1e-12):
        return mean_interval(values)
    if not isinstance(error, numbers.Real):
        return (math.nan, math.nan)
    return (value - _Z * float(error), value + _Z * float(error))


def _records(task: str, samples: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        kept = {name: sample[name] for name in (*_LOGGED, *sample["metrics"]) if name in sample}
        yield {"task": task, **_plain(kept)}


def _plain(values: Any) -> Any:
    """JSON and nothing else: numbers of numpy as numbers, what is no JSON as its text."""
    return json.loads(json.dumps(values, default=lambda x: x.item() if hasattr(x, "item") else str(x)))
