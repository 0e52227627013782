"""GSM8K: grade-school word problems (Cobbe et al. 2021), eight chains of thought before the question."""

import re
from dataclasses import dataclass

from iha_jax.evaluation.reasoning.data import Row, rows_of
from iha_jax.evaluation.reasoning.examples import GSM8K
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

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
_NUMBER = rf"(?:(?<![\w)])-)?(?:\$\s?-?)?{_DIGITS}"  # "7-5" ends in 5, not in -5
_STRICT = re.compile(rf"(?:####|[Tt]he answer is:?)\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)


def normalized(number: str) -> str | None:
    """A number in one spelling: no currency sign, thousands separators or idle zeros; None for anything else."""
    plain = re.fullmatch(r"(-?)(\d*)(?:\.(\d*))?", re.sub(r"[\s$,]", "", number))
    if plain is None or not (plain[2] or plain[3]):
        return None
    whole, part = plain[2].lstrip("0") or "0", (plain[3] or "").rstrip("0")
    size = f"{whole}.{part}" if part else whole
    return size if size == "0" else plain[1] + size


def strict_answer(text: str) -> str | None:
    """The number after the first "####" or "The answer is": what follows it belongs to another problem."""
    found = _STRICT.search(text)
    return normalized(found.group(1)) if found else None


def flexible_answer(text: str) -> str | None:
    """The last number of the text."""
    found = _ANY.findall(text)
    return normalized(found[-1]) if found else None


@dataclass(frozen=True)
class Problem:
    question: str
    gold: str


def problem_of(row: Row) -> Problem:
    """A row's question, and the number after the last "####" of its answer. Raises ValueError where there is none."""
    gold = normalized(str(row["answer"]).rpartition("####")[2].strip())
    if gold is None:
        raise ValueError(f"field 'answer' has no number after '####': {str(row['answer'])[-60:]!r}")
    return Problem(str(row["question"]), gold)


def prompt_of(problem: Problem, shots: int, *, chat: bool) -> str:
    """Wei et al.'s "Q: ... A: ..."; in a conversation the questions alone."""
    if chat:
        return conversation(GSM8K[:shots], problem.question)
    solved = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in GSM8K[:shots])
    return f"{solved}Q: {problem.question}\nA:"


def run_gsm8k(model: TextModel, options: Options) -> TaskResult:
    """Metrics `p@k`, `maj@k`, for the answer in its place, and both `_flexible`, for the last number of a text.

    Raises ValueError for data and options that cannot be used, before the model generates.
    """
    shots = shot_count("gsm8k", options, len(GSM8K))
    sampling = sampling_of("gsm8k", options, max_tokens=512, stop=("Q:",))
    problems = rows_of("gsm8k", options, ("question", "answer"), problem_of, hub="hub:openai/gsm8k:main")
    prompts = [prompt_of(problem, shots, chat=options.chat) for problem in problems]
    completions = complete(model, prompts, sampling)
    gold = [problem.gold for problem in problems]
    values: dict[str, list[float]] = {}
    judged: list[list[dict[str, object]]] = [[{} for _ in one.samples] for one in completions]
    for suffix, extract in (("", strict_answer), ("_flexible", flexible_answer)):
        answers = [[extract(sample.text) for sample in one.samples] for one in completions]
        correct = [[answer == right for answer in row] for row, right in zip(answers, gold, strict=True)]
        values |= pass_metrics(correct, suffix) | vote_metrics(answers, gold, suffix)
        for found, row, rights in zip(judged, answers, correct, strict=True):
            for one, answer, right in zip(found, row, rights, strict=True):
                one |= {f"extracted{suffix}": answer, f"correct{suffix}": right}
    judged = [[{"gold": right, **one} for one in row] for row, right in zip(judged, gold, strict=True)]
    records = records_of(range(len(problems)), completions, sampling.seed, judged)
    settings = {"data": options.data["gsm8k"], "shots": shots, "chat": options.chat}
    return result_of(summarize(values), settings, sampling, completions, records)
