"""GSM8K: grade-school word problems (Cobbe et al. 2021), eight chains of thought before the question."""

import re
from decimal import Decimal, InvalidOperation

from iha_jax.evaluation.reasoning.data import limited, rows_of
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

_NUMBER = r"-?\s?\$?\s?-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_STRICT = re.compile(rf"(?:####|[Tt]he answer is:?)\s*({_NUMBER})")
_ANY = re.compile(rf"(?<![\w.)-])-\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)|{_NUMBER.removeprefix('-?')[0:0]}\d[\d,]*(?:\.\d+)?|\.\d+")


def normalized(number: str) -> str | None:
    """A number in one spelling: no currency sign, thousands separator or trailing zero; None for anything else."""
    plain = re.sub(r"[\s$,]", "", number).rstrip(".")
    try:
        value = Decimal(plain)
    except InvalidOperation:
        return None
    if not value.is_finite():
        return None
    return format(value.normalize() + 0, "f")  # + 0: no negative zero


def strict_answer(text: str) -> str | None:
    """The number after the first "####" or "The answer is": what follows it belongs to another problem."""
    found = _STRICT.search(text)
    return normalized(found.group(1)) if found else None


def flexible_answer(text: str) -> str | None:
    """The last number of the text."""
    found = _ANY.findall(text)
    return normalized(found[-1]) if found else None
