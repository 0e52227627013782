"""RULER's prompts in tests: small files of questions, answers read from a prompt alone, a scripted model."""

import collections
import itertools
import re

from iha_jax.data.tokenizers import Bytes
from iha_jax.evaluation.ruler.task import samples
from iha_jax.evaluation.text_model import STOP, Completion, Sample


def squad(articles=3, paragraphs=4):
    def paragraph(a, p):
        text = f"Article {a}, paragraph {p}: the color of house {a}-{p} is shade{a}{p}."
        asked = {"question": f"What is the color of house {a}-{p}?", "is_impossible": False}
        answers = [{"text": f"shade{a}{p}"}, {"text": f"the color shade{a}{p}"}]
        never = {"question": "Why?", "is_impossible": True, "answers": []}
        return {"context": text, "qas": [never, asked | {"answers": answers}]}

    return {"data": [{"paragraphs": [paragraph(a, p) for p in range(paragraphs)]} for a in range(articles)]}


def hotpotqa(records=5):
    def context(i):
        return [[f"Town {j}", [f"Town {j} lies on river {j}. ", f"It has {j + 20} bridges."]] for j in (i, i + 1)]

    return [
        {"question": f"How many bridges has the town on river {i}?", "answer": str(i + 20), "context": context(i)}
        for i in range(records)
    ]


def solve(prompt):
    """The answers, read from the prompt alone; questions about documents by what the fixtures' sentences say."""
    if "special magic" in prompt:
        asked = re.search(
            r"(\w+?)s? for (.*) mentioned in the provided text (?:is|are)$", prompt.rsplit("magic ", 1)[1]
        )
        found = []
        for key in re.split(", and |, ", asked[2]):
            found += re.findall(rf"One of the special magic {asked[1]}s for {re.escape(key)} is: (\S+)\.", prompt)
        return found
    if "Memorize and track" in prompt:
        text = prompt.rsplit("Memorize and track", 1)[1]
        value = re.search(r"assigned the value (\d+) in the text above", text)[1]
        values = {}
        for name, right in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", text):
            values[name] = values.get(right, right)
        return [name for name, its in values.items() if its == value]
    if "numbered list of words" in prompt:
        listed = prompt.rsplit("most often.\n", 1)[1].split("\nQuestion")[0]
        return [word for word, _ in collections.Counter(re.split(r" ?\d+\. ", listed)[1:]).most_common(10)]
    if "coded text" in prompt:
        counts = collections.Counter(re.search(r"coded words\. (.*)\nQuestion", prompt)[1].split())
        del counts["..."]
        return [word for word, _ in counts.most_common(3)]
    house, river = re.search(r"house (\S+)\?", prompt), re.search(r"on river (\d+)\?", prompt)
    said = rf"house {house[1]} is (\w+)\." if house else rf"lies on river {river[1]}\. It has (\d+)"
    return [re.search(said, prompt)[1]]


def solve_one(prompt):
    return solve(prompt)[0]


class Scripted:
    """Answers each prompt by a function of it."""

    tokenizer = Bytes()

    def __init__(self, answer, context_length=4096):
        self.answer, self.context_length, self.calls = answer, context_length, []

    def complete(self, prompts, sampling):
        self.calls.append(sampling)
        self.prompts = prompts
        return [Completion(len(p.encode()), 0, (Sample(self.answer(p), (), STOP),)) for p in prompts]


def first(name, length, tokenizer, material, count=3, **options):
    return list(itertools.islice(samples(name, length, tokenizer, material, **options), count))
