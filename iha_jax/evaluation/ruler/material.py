"""What prompts are made of and RULER's definition does not contain: words, essays, questions."""

import hashlib
import importlib.metadata
import importlib.resources
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from iha_jax.evaluation.ruler.questions import Questions, read_hotpotqa, read_squad

SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")
MANUAL = "Python's reference manual"


@dataclass(frozen=True)
class Words:
    """Adjectives and nouns, of which keys are made, and all words of the lists (for cwe), sorted."""

    adjectives: Sequence[str]
    nouns: Sequence[str]
    all: Sequence[str]


@dataclass(frozen=True)
class Material:
    """`facts` says what each part is, `variants` which parts are not the published ones."""

    words: Words | None = None
    essays: Sequence[str] = ()  # words of the text
    questions: Mapping[str, Questions] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    variants: frozenset[str] = frozenset()


def load_material(needs: frozenset[str], data: Mapping[str, str]) -> Material:
    """What is needed of "words", "essays", "squad" and "hotpotqa"; `data` has files of the latter three.

    Raises:
      ValueError: for questions that no file is given for, a file that cannot be read or is malformed (naming it, the
        record and the field), and essays without words.
    """
    words, essays, questions, facts, variants = None, (), {}, {}, set()
    if "words" in needs:
        words, facts["words"], published = _words()
        variants |= set() if published else {"words"}
    if "essays" in needs:
        essays, facts["essays"], published = _essays(data.get("essays"))
        variants |= set() if published else {"essays"}
    for name, read in (("squad", read_squad), ("hotpotqa", read_hotpotqa)):
        if name in needs:
            if name not in data:
                raise ValueError(missing(name))
            raw = _bytes(name, data[name])
            facts[name] = _fact(data[name], raw)
            try:
                questions[name] = read(json.loads(raw))
            except ValueError as error:  # of json too, and of undecodable bytes
                raise ValueError(f"--data={name}={data[name]}: {error}") from error
    return Material(words, essays, questions, facts, frozenset(variants))


def missing(name: str) -> str:
    published = {"squad": "SQuAD 2.0's dev-v2.0.json", "hotpotqa": "HotpotQA's hotpot_dev_distractor_v1.json"}
    return f"needs {published[name]}: give --data={name}=FILE"


def made_words() -> Sequence[str]:
    """All 343 000 words of three syllables, such as "badege", in an order that looks random and is always the same."""
    n = len(SYLLABLES) ** 3
    step = 211_811  # prime to n, so that multiples of it visit every word
    return _MadeWords(n, step)


class _MadeWords(Sequence[str]):
    def __init__(self, n: int, step: int):
        self._n, self._step = n, step

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self._n))]
        if not 0 <= i < self._n:
            raise IndexError(i)
        rest, parts = i * self._step % self._n, []
        for _ in range(3):
            rest, syllable = divmod(rest, len(SYLLABLES))
            parts.append(SYLLABLES[syllable])
        return "".join(parts)


def _words() -> tuple[Words, str, bool]:
    try:
        folder = importlib.resources.files("wonderwords.assets")
    except ModuleNotFoundError:
        made = made_words()
        return Words(made[:2000], made[2000:4000], sorted(made[:8000])), "made of syllables", False
    nouns, adjectives, verbs = (
        (folder / f"{kind}list.txt").read_text(encoding="utf-8").split("\n") for kind in ("noun", "adjective", "verb")
    )
    nouns, adjectives, verbs = (sorted({w.strip() for w in words} - {""}) for words in (nouns, adjectives, verbs))
    version = importlib.metadata.version("wonderwords")
    return Words(adjectives, nouns, sorted({*nouns, *adjectives, *verbs})), f"wonderwords {version}", True


def _essays(path: str | None) -> tuple[Sequence[str], str, bool]:
    if path is not None:
        raw = _bytes("essays", path)
        try:
            text = json.loads(raw)["text"] if path.endswith(".json") else raw.decode()
            words = text.split()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f'--data=essays={path}: expected UTF-8 text, or JSON with a string "text", as RULER\'s '
                f"PaulGrahamEssays.json ({type(error).__name__}: {error})"
            ) from error
        if not words:
            raise ValueError(f"--data=essays={path}: no words in it")
        return words, _fact(path, raw), True
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError("this Python comes without its manual (pydoc_data): give --data=essays=FILE") from error
    text = " ".join(topics[name] for name in sorted(topics))
    return text.split(), _fact(MANUAL, text.encode()), False


def _bytes(name: str, path: str) -> bytes:
    try:
        return epath.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"--data={name}={path}: cannot be read: {error.strerror or error}") from error


def _fact(name: str, raw: bytes) -> str:
    return f"{name}, sha256 {hashlib.sha256(raw).hexdigest()}"


def word_stream(words: Words, order: Sequence[int]) -> itertools.chain[str]:
    """The lists' words in `order`, then made ones that the lists do not have."""
    known = set(words.all)
    return itertools.chain((words.all[i] for i in order), (w for w in made_words() if w not in known))
