"""A small reasoning set, generated: sums in a sentence, for fine-tuning and evaluating small models.

    python -m iha_jax.data.arithmetic --output=data/arithmetic

writes `train.jsonl` and `validation.jsonl`, conversations for `data.sources = ("chat:data/arithmetic",)`, and
`test.jsonl`, problems in the layout of GSM8K (`question`, `answer` with its result after "####"). A problem belongs to
one of the three files by a hash of its question: no test question was trained on, but its two numbers were, in other
words. There are 126 pairs of numbers: models of minutes learn them by heart, and unseen pairs measured luck.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np
from etils import epath

from iha_jax.data.storage import write_text

NAMES = ("Ann", "Ben", "Eva", "Tom", "Zoe")
THINGS = ("cups", "eggs", "nuts", "pens")
QUESTIONS = {
    "+": ("{name} has {a} {things} and gets {b}. How many now?", "{name} buys {a} {things}, then {b}. How many?"),
    "-": (
        "{name} has {a} {things} and sells {b}. How many now?",
        "Of {a} {things} {name} eats {b}. How many are left?",
    ),
}
LARGEST = 9  # of a and b; a result is never negative
PERCENT = {"test": 15, "validation": 5}  # of the questions; the rest is train


def file_of(question: str) -> str:
    """ "train", "validation" or "test"."""
    place = int(hashlib.sha256(question.encode()).hexdigest(), 16) % 100
    return "test" if place < PERCENT["test"] else "validation" if place < sum(PERCENT.values()) else "train"


def problems(file: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """`count` (question, answer) of a file, drawn anew each: the first ones do not depend on `count`."""
    rng = np.random.default_rng([seed, sorted({"train", *PERCENT}).index(file)])
    while count:
        operation = "+-"[rng.integers(2)]
        a, b = (int(x) for x in rng.integers(1, LARGEST + 1, 2))
        if operation == "-":
            a, b = max(a, b), min(a, b)
        words = dict(name=NAMES[rng.integers(len(NAMES))], things=THINGS[rng.integers(len(THINGS))], a=a, b=b)
        question = QUESTIONS[operation][rng.integers(2)].format(**words)
        if file_of(question) == file:
            result = a + b if operation == "+" else a - b
            yield question, f"{a} {operation} {b} = {result}\n#### {result}"
            count -= 1


def write(output: epath.PathLike, counts: dict[str, int], seed: int) -> None:
    """Writes the three files, each whole."""
    folder = epath.Path(output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for file, count in counts.items():
        lines = []
        for question, answer in problems(file, count, seed):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.append({"question": question, "answer": answer} if file == "test" else {"messages": turns})
        write_text(folder / f"{file}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 2 refused input."""
    parser = argparse.ArgumentParser(prog="python -m iha_jax.data.arithmetic", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", required=True, help="folder of the three files")
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    counts = {name: getattr(flags, name) for name in ("train", "validation", "test")}
    if min(counts.values()) < 1 or flags.seed < 0:
        print("refused: expected at least 1 problem of each file, and a seed of at least 0", file=sys.stderr)
        sys.exit(2)
    try:
        write(flags.output, counts, flags.seed)
    except (OSError, ValueError) as error:
        print(f"refused: --output={flags.output}: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{flags.output}: " + ", ".join(f"{count:,} problems in {name}.jsonl" for name, count in counts.items()))
    sys.exit(0)


if __name__ == "__main__":
    main()
