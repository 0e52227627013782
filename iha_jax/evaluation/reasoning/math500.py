"""MATH-500: competition problems (Hendrycks et al. 2021; Lightman et al.'s 500), Minerva's four-shot prompt."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from iha_jax.evaluation.reasoning.data import Row, rows_of
from iha_jax.evaluation.reasoning.equivalence import Equivalence
from iha_jax.evaluation.reasoning.examples import MATH
from iha_jax.evaluation.reasoning.metrics import pass_metrics, summarize, vote_metrics
from iha_jax.evaluation.reasoning.sampling import (
    complete,
    conversation,
    records_of,
    result_of,
    sampling_of,
    shot_count,
)
from iha_jax.evaluation.tasks import Options, TaskResult
from iha_jax.evaluation.text_model import TextModel

_SAID = r"[Ff]inal [Aa]nswer is:?\s*"
_PARAGRAPH = r"((?:(?!\n\s*\n)[\s\S])+?)"
_FINAL = re.compile(rf"{_SAID}{_PARAGRAPH}\.?\s*I hope it is correct|{_SAID}(.+)")


def last_boxed(text: str) -> str | None:
    """What the last closed \\boxed{...} or \\fbox{...} holds, or the word after a \\boxed without braces."""
    return _last_boxed(text)[1]


def _last_boxed(text: str) -> tuple[int, str | None]:
    """Where the last box with anything in it begins (-1: there is none), and what it holds."""
    place, found = -1, None
    for match in re.finditer(r"\\(?:boxed|fbox)\s*(\{)?", text):
        if match.group(1) is None:
            bare = re.match(r"[^\s$.,}]+", text[match.end() :])
            place, found = (match.start(), bare.group(0)) if bare else (place, found)
            continue
        depth = 1
        for token in re.finditer(r"\\.|[{}]", text[match.end() :], re.DOTALL):  # an escaped brace closes nothing
            depth += {"{": 1, "}": -1}.get(token.group(0), 0)
            if depth == 0:
                inside = text[match.end() :][: token.start()].strip()
                place, found = (match.start(), inside) if inside else (place, found)
                break
    return place, found


def math_answer(text: str) -> str | None:
    """The LaTeX of the last line "The final answer is ...", or of a box that stands behind it; without dollar signs."""
    place, boxed = _last_boxed(text)
    said = [found for found in _FINAL.finditer(text) if found.start() > place]
    if not said:
        return boxed
    answer = (said[-1].group(1) or said[-1].group(2)).strip().removesuffix(".")
    return answer.strip().strip("$").strip() or boxed


@dataclass(frozen=True)
class Problem:
    name: str
    problem: str
    gold: str


def problem_of(row: Row) -> Problem:
    """A row's problem, and its answer or what its solution boxes. Raises ValueError for a solution without a box."""
    gold = row.get("answer")
    if gold is None:
        gold = last_boxed(str(row["solution"]))
    if gold is None or not str(gold).strip():
        raise ValueError("field 'answer' is empty, or field 'solution' has no \\boxed{...}")
    return Problem(str(row.get("unique_id", "")), str(row["problem"]), str(gold).strip().strip("$"))


def prompt_of(problem: Problem, shots: int, *, chat: bool) -> str:
    """Minerva's "Problem: ... Solution: ..."; in a conversation the problems alone."""
    if chat:
        return conversation(MATH[:shots], problem.problem)
    solved = "".join(f"Problem:\n{asked}\n\nSolution: {answered}\n\n" for asked, answered in MATH[:shots])
    return f"{solved}Problem:\n{problem.problem}\n\nSolution:"


def classes_of(answers: Sequence[str | None], gold: str, equivalence: Equivalence) -> list[int | None]:
    """The class of each answer: 0 for gold's, else the number (from 1) of the first answer of its kind; None for none.

    Each is compared with the first of every class, so a class is what equals its first.
    """
    firsts, found = [gold], []
    for answer in answers:
        if answer is None:
            found.append(None)
            continue
        place = next((i for i, first in enumerate(firsts) if equivalence.same(first, answer)), len(firsts))
        if place == len(firsts):
            firsts.append(answer)
        found.append(place)
    return found


def run_math500(model: TextModel, options: Options) -> TaskResult:
    """Metrics `p@k` and `maj@k`, where answers are equal if `math-verify` says so.

    Raises ValueError for data and options that cannot be used, before the model generates.
    """
    shots = shot_count("math500", options, len(MATH))
    sampling = sampling_of("math500", options, max_tokens=1024, stop=("Problem:",))
    fields = ("problem", ("answer", "solution"))
    problems = rows_of("math500", options, fields, problem_of, hub="hub:HuggingFaceH4/MATH-500")
    with Equivalence() as equivalence:
        completions = complete(model, [prompt_of(one, shots, chat=options.chat) for one in problems], sampling)
        answers = [[math_answer(sample.text) for sample in one.samples] for one in completions]
        votes = [classes_of(row, problem.gold, equivalence) for row, problem in zip(answers, problems, strict=True)]
    correct = [[vote == 0 for vote in row] for row in votes]
    judged = [
        [
            {"gold": problem.gold, "extracted": answer, "correct": right}
            for answer, right in zip(row, rights, strict=True)
        ]
        for problem, row, rights in zip(problems, answers, correct, strict=True)
    ]
    values = pass_metrics(correct) | vote_metrics(votes, [0] * len(problems))
    names = [problem.name or number for number, problem in enumerate(problems)]
    records = records_of(names, completions, sampling.seed, judged)
    settings = {"data": options.data["math500"], "shots": shots, "chat": options.chat}
    given_up = equivalence.given_up
    return result_of(summarize(values), settings, sampling, completions, records, comparisons_given_up=given_up)
