"""Needles in a haystack: niah_single, niah_multikey, niah_multivalue, niah_multiquery."""

import random
import uuid
from collections.abc import Callable, Sequence

from iha_jax.evaluation.ruler.definition import DEPTHS, NEEDLE, NOISE, Needles, Wording
from iha_jax.evaluation.ruler.material import Words
from iha_jax.evaluation.ruler.sample import Draw, Growing, Sample

SENTENCE_ENDS = (".", "!", "?")
CLOSING = "\"')]}\u201d\u2019"


def needles(task: Needles, draw: Draw) -> Growing:
    """A unit is a line of noise, another needle, or a word of an essay."""
    rng = draw.generator("items")
    words = draw.material.words
    keys = _distinct(lambda: random_item(task.key, rng, words), task.keys)
    numbers = _distinct(lambda: random_item(task.value, rng, words), task.keys * task.values)
    values = [numbers[i * task.values : (i + 1) * task.values] for i in range(task.keys)]
    sentences = [
        NEEDLE.format(kind=task.value, key=key, value=value)
        for key, its in zip(keys, values, strict=True)
        for value in its
    ]
    rng.shuffle(sentences)
    asked = rng.sample(range(task.keys), task.queries)
    query = and_list([keys[i] for i in asked])
    answers = tuple(value for i in asked for value in values[i])
    template, prefix, kind = _number(task.wording, task.value, len(answers))
    haystack = _haystack(task, draw, keys)
    in_essays = task.haystack == "essays"

    def at(size: int) -> Sample:
        if in_essays:
            context = _between_sentences(haystack(size), sentences, draw.generator("depths"))
        else:
            context = "\n".join(_between_lines(haystack(size), sentences, draw.generator("positions")))
        return Sample(
            template.format(kind=kind, context=context, query=query), prefix.format(kind=kind, query=query), answers
        )

    return Growing(0 if in_essays else len(sentences), at)


def random_item(kind: str, rng: random.Random, words: Words | None) -> str:
    """A seven-digit number, an adjective and a noun, or a UUID of version 4."""
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    assert words is not None
    return f"{rng.choice(words.adjectives)}-{rng.choice(words.nouns)}"


def and_list(items: Sequence[str]) -> str:
    """ "a", "a, and b", "a, b, and c"."""
    return f"{', '.join(items[:-1])}, and {items[-1]}" if len(items) > 1 else items[0]


def _number(wording: Wording, kind: str, answers: int) -> tuple[str, str, str]:
    """Template, answer prefix and kind, in the singular for one answer, by the published replacements."""
    template, prefix = wording.template, wording.answer_prefix
    if answers > 1:
        return template, prefix, kind
    for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is")):
        template, prefix = template.replace(plural, singular), prefix.replace(plural, singular)
    return template, prefix, kind.removesuffix("s")


def _haystack(task: Needles, draw: Draw, taken: Sequence[str]) -> Callable[[int], list[str]]:
    """The first n units, as a function of n."""
    if task.haystack == "noise":
        return lambda n: [NOISE] * n
    if task.haystack == "essays":
        words = list(draw.material.essays)
        return lambda n: (words * -(-n // len(words)))[:n]
    rng = draw.generator("haystack")
    drawn: list[str] = []

    def others(n: int) -> list[str]:
        while len(drawn) < n:
            key = random_item(task.key, rng, draw.material.words)
            value = random_item(task.value, rng, draw.material.words)
            if key not in taken:
                drawn.append(NEEDLE.format(kind=task.value, key=key, value=value))
        return drawn[:n]

    return others


def _between_lines(lines: list[str], sentences: Sequence[str], rng: random.Random) -> list[str]:
    """One sentence before each of as many lines, drawn without repetition."""
    places = sorted(rng.sample(range(len(lines)), len(sentences)), reverse=True)
    for place, sentence in zip(places, sentences, strict=True):
        lines.insert(place, sentence)
    return lines


def _between_sentences(words: Sequence[str], needles: Sequence[str], rng: random.Random) -> str:
    """Needles at distinct published depths: per cent of the text's sentences that come before."""
    starts = [0, *(i + 1 for i, word in enumerate(words[:-1]) if word.rstrip(CLOSING).endswith(SENTENCE_ENDS))]
    total = len(starts) if words else 0
    starts.append(len(words))
    at = [int(total * (depth / 100)) for depth in sorted(rng.sample(DEPTHS, len(needles)))]
    pieces = []
    for begin, end, needle in zip([0, *at], [*at, total], [*needles, None], strict=True):
        pieces.append(" ".join(words[starts[begin] : starts[end]]) if begin < end else "")
        if needle is not None:
            pieces.append(needle)
    return " ".join(pieces)


def _distinct(draw: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)
