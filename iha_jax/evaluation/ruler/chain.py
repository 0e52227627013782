"""Variable tracking: which variables have a value, through a chain of assignments (vt)."""

import itertools
import random
import string

from iha_jax.evaluation.ruler.definition import NOISE, Chain
from iha_jax.evaluation.ruler.length import largest_fitting
from iha_jax.evaluation.ruler.sample import Draw, Growing, Sample


def chain(task: Chain, draw: Draw) -> Growing:
    """A solved example, then the question. A unit is a line of noise."""
    rng = draw.generator("items")
    value, other_value = (str(number) for number in rng.sample(range(10000, 99999), 2))
    names, other_names = _names(rng, 5, task.hops + 1), _names(rng, 3, task.hops + 1)
    minimum = task.hops + 1  # each assignment goes before another line

    def example(size: int) -> Sample:
        return _question(task, other_names, other_value, size, draw.generator("positions of the example"))

    lines = largest_fitting(lambda n: draw.count(example(n).prompt), task.example_tokens, minimum) or minimum
    solved = f"{example(lines).prompt} {' '.join(other_names)}\n\n"

    def at(size: int) -> Sample:
        asked = _question(task, names, value, size, draw.generator("positions"))
        return Sample(solved + asked.question, asked.answer_prefix, asked.answers)

    return Growing(minimum, at)


def _names(rng: random.Random, letters: int, count: int) -> list[str]:
    """Distinct words of capital letters, but "VAR"."""
    found: dict[str, None] = {}
    while len(found) < count:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name != "VAR":
            found[name] = None
    return list(found)


def _question(task: Chain, names: list[str], value: str, noise: int, rng: random.Random) -> Sample:
    """Assignments in their order, each before another of `noise` lines."""
    assignments = [f"VAR {names[0]} = {value}"]
    assignments += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names)]
    lines = [NOISE] * noise
    for i, (place, assignment) in enumerate(
        zip(sorted(rng.sample(range(noise), len(names))), assignments, strict=True)
    ):
        lines.insert(place + i, assignment)
    wording = task.wording
    return Sample(
        wording.template.format(context="\n".join(lines), query=value),
        wording.answer_prefix.format(variables=len(names), query=value),
        tuple(names),
    )
