"""Counting words: the most common of a numbered list (cwe), the most frequent of a coded text (fwe)."""

import itertools
import random
import string
from collections.abc import Sequence

from scipy.special import zeta

from iha_jax.evaluation.ruler.definition import SHORT, CodedText, WordList
from iha_jax.evaluation.ruler.material import word_stream
from iha_jax.evaluation.ruler.sample import Draw, Growing, Sample


def word_list(task: WordList, draw: Draw) -> Growing:
    """A solved example, then the question. A unit is a word that is not common, as often as such words occur."""
    short = draw.length < SHORT
    occurrences = task.short_occurrences if short else task.occurrences
    words, *example_occurrences = task.short_example if short else task.example
    assert draw.material.words is not None
    rng, lists = draw.generator("items"), draw.material.words
    example_words = rng.sample(lists.all, words)
    order = rng.sample(range(len(lists.all)), len(lists.all))
    wording = task.wording
    example = wording.template.format(context=_numbered(example_words, task.common, example_occurrences, rng))
    solved = f"{example}{wording.answer_prefix} {_items(example_words[: task.common])}\n"
    stream, drawn = word_stream(lists, order), []

    def at(size: int) -> Sample:
        drawn.extend(itertools.islice(stream, max(0, size - len(drawn))))
        context = _numbered(drawn[:size], task.common, occurrences, draw.generator("order"))
        answers = tuple(drawn[: task.common])
        return Sample(solved + wording.template.format(context=context), wording.answer_prefix, answers)

    return Growing(task.common + 1, at)


def _numbered(words: Sequence[str], common: int, occurrences: Sequence[int], rng: random.Random) -> str:
    """The first `common` words as often as the first of `occurrences` says, the others as the second, shuffled."""
    listed = [*words[:common]] * occurrences[0] + [*words[common:]] * occurrences[1]
    rng.shuffle(listed)
    return _items(listed)


def _items(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def coded_text(task: CodedText, draw: Draw) -> Growing:
    """Words of random letters by a zeta law, the most frequent replaced by dots. A unit is a word of text, rounded.

    Sizes at which the last word asked for is no more frequent than the next are taken down to the next that decides.

    Raises:
      ValueError: for a length whose vocabulary has not enough words.
    """
    rng = draw.generator("items")
    room = draw.length - task.wording.max_tokens
    size_of_vocabulary = room // task.tokens_a_word
    if size_of_vocabulary < task.answers + 1:
        needed = (task.answers + 1) * task.tokens_a_word + task.wording.max_tokens
        raise ValueError(f"needs {needed} tokens: a vocabulary has a word for {task.tokens_a_word} tokens of prompt")
    coded: dict[str, None] = {}
    while len(coded) < size_of_vocabulary:
        coded["".join(rng.choices(string.ascii_lowercase, k=task.letters))] = None
    vocabulary = ["...", *list(coded)[1:]]
    answers = tuple(vocabulary[1 : task.answers + 1])

    def counts(words: int) -> list[int]:
        scale = words / zeta(task.alpha)
        return [int(scale * k**-task.alpha) for k in range(1, len(vocabulary) + 1)]

    def decides(words: int) -> bool:
        found = [*counts(words), 0]
        return found[task.answers] > found[task.answers + 1]

    def at(size: int) -> Sample:
        while not decides(size):
            size -= 1
        text = [word for word, count in zip(vocabulary, counts(size), strict=True) for _ in range(count)]
        draw.generator("order").shuffle(text)
        return Sample(task.wording.template.format(context=" ".join(text)), task.wording.answer_prefix, answers)

    return Growing(next(n for n in itertools.count(1) if decides(n)), at)
