"""RULER beside lm-evaluation-harness's port, where `lm-eval[ruler]` is installed: the same texts, counts and scores.

Deviations of theirs that `iha_jax/evaluation/ruler/__init__.py` lists are asserted: a version without them shows.
"""

import collections
import importlib
import json
import random
import re
import sys
import types

import pytest

from iha_jax.evaluation.ruler import definition
from iha_jax.evaluation.ruler.material import load_material
from iha_jax.evaluation.ruler.sample import Draw
from iha_jax.evaluation.ruler.scoring import string_match
from iha_jax.evaluation.ruler.task import GENERATORS
from tests.ruler_prompts import hotpotqa, solve, squad

pytestmark = pytest.mark.slow  # importing theirs makes a list of six million keys


@pytest.fixture(scope="module")
def theirs():
    for name in ("lm_eval", "nltk", "wonderwords", "datasets"):
        pytest.importorskip(name)
    import nltk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *_, **__: False)  # their import downloads
        try:
            importlib.import_module("transformers")
        except ImportError:
            patch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoTokenizer=None))  # unused here
        names = ("common_utils", "prepare_niah", "niah_utils", "vt_utils", "cwe_utils", "fwe_utils", "qa_utils")
        modules = {name: importlib.import_module(f"lm_eval.tasks.ruler.{name}") for name in names}
        sentences = lambda text: re.split(r"(?<=[.!?]) ", text)  # noqa: E731  (NLTK's model is another download)
        patch.setattr(modules["prepare_niah"], "cached_sent_tokenize", sentences)
        yield types.SimpleNamespace(**modules)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "squad").write_text(json.dumps(squad(4, 3)))
    (folder / "hotpotqa").write_text(json.dumps(hotpotqa()))
    (folder / "essays").write_text("One idea is this. Another is not! Is it? So it goes on, and on. " * 9)
    files = {name: str(folder / name) for name in ("squad", "hotpotqa", "essays")}
    return load_material(frozenset(["words", *files]), files)


def ours(name, size, material, length=4096, index=0, count=len):
    task = definition.SUBTASKS[name]
    return GENERATORS[type(task)](task, Draw(name, length, index, 0, count, material)).at(size)


def test_wording_and_constants(theirs):
    assert theirs.niah_utils.TEMPLATE.format(type_needle_v="x", context="c", query="q") == (
        definition.NIAH.template.format(kind="x", context="c", query="q")
    )
    assert tuple(theirs.prepare_niah.DEPTHS) == definition.DEPTHS
    assert theirs.prepare_niah.get_haystack("repeat") == definition.NOISE
    assert theirs.prepare_niah.get_haystack("needle").replace("type_needle_v", "kind") == definition.NEEDLE
    for wording, config in (
        (definition.VARIABLE_TRACKING, theirs.vt_utils.CONFIG["variable_tracking"]),
        (definition.COMMON_WORDS, theirs.cwe_utils.CONFIG),
        (definition.FREQUENT_WORDS, theirs.fwe_utils.CONFIG),
        (definition.QUESTION, theirs.qa_utils.CONFIG),
    ):
        assert config["template"] == wording.template
        assert config["tokens_to_generate"] == wording.max_tokens
        prefix = config["answer_prefix"].replace("assgined", "assigned").replace("{num_v}", "{variables}")
        assert prefix.strip() == wording.answer_prefix.strip()
    assert "assgined" in theirs.vt_utils.CONFIG["variable_tracking"]["answer_prefix"]
    assert theirs.qa_utils.DOCUMENT_PROMPT.replace("{i}", "{number}") == definition.DOCUMENT


def test_words(theirs, material):
    assert sorted(theirs.cwe_utils.WORDS) == material.words.all
    assert set(theirs.prepare_niah.adjs) == set(material.words.adjectives)
    assert set(theirs.prepare_niah.nouns) == set(material.words.nouns)


def without_items(text):
    """A prompt's lines, sorted, with keys, values and UUIDs replaced."""
    text = re.sub(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "UUID", text)
    text = re.sub(r" for [^:?\n]+(?= is:| mentioned)", lambda m: f" for {m[0].count(', ') + 1} KEYS", text)
    return sorted(re.sub(r"\b\d{7}\b", "NUMBER", text).split("\n"))


def their_needles(theirs, name, size, material):
    task = definition.SUBTASKS[name]
    kind = {"noise": "repeat", "essays": "essay", "needles": "needle"}[task.haystack]
    haystack = list(material.essays) if kind == "essay" else theirs.prepare_niah.get_haystack(kind)
    return theirs.prepare_niah.generate_input_output(
        size,
        haystack,
        type_haystack=kind,
        num_needle_k=task.keys,
        type_needle_k=task.key,
        num_needle_v=task.values,
        type_needle_v=task.value,
        template=theirs.niah_utils.TEMPLATE,
        num_needle_q=task.queries,
    )


@pytest.mark.parametrize("name", [name for name in definition.SUBTASKS if name.startswith("niah")])
def test_needles(name, theirs, material):
    sample = ours(name, 41, material)
    text, answers, query = their_needles(theirs, name, 41, material)
    assert len(answers) == len(sample.answers)
    prefix = re.sub(" for .* mentioned", f" for {query} mentioned", sample.answer_prefix)
    assert sorted(solve(text + prefix)) == sorted(answers)
    question = sample.question
    if definition.SUBTASKS[name].haystack == "essays":  # one line; where the needles go is drawn
        needle = r"One of the special magic \w+ for [^.]+ is: \S+\."
        assert len(re.findall(needle, text)) == len(re.findall(needle, question))
        text, question = (
            "\n".join(" ".join(re.sub(needle, "", line).split()) for line in t.split("\n")) for t in (text, question)
        )
    assert without_items(text) == without_items(question)


def test_depths_of_needles(theirs, material, monkeypatch):
    """The same depths give the same text, the first and the last of them too."""
    for depths in ([0, 100, 49, 51], [3, 5, 95, 97], [0, 3, 97, 100]):
        monkeypatch.setattr(random, "sample", lambda of, k, d=depths: d if len(of) == 40 else list(of)[:k])
        text, _, _ = their_needles(theirs, "niah_multivalue", 97, material)
        monkeypatch.setattr(random.Random, "sample", lambda self, of, k, d=depths: d if len(of) == 40 else list(of)[:k])
        sample = ours("niah_multivalue", 97, material)
        monkeypatch.undo()
        blank = [re.sub(r"for [^:]+ is: \d+", "for KEY is: VALUE", t.split("\n")[1]) for t in (text, sample.question)]
        assert blank[0] == blank[1]


def test_variable_tracking(theirs, material):
    text, answers = theirs.vt_utils.generate_input_output(23, 1, 4)
    sample = ours("vt", 23, material, count=lambda text: len(text.split()))
    assert sorted(solve(text)) == sorted(answers)
    solved, asked = sample.prompt.split("\n\nMemorize")

    def blank(text):
        text = re.sub(r"they are: [A-Z ]+", "they are: NAMES", text)
        text = re.sub(r"VAR [A-Z]+", "VAR NAME", re.sub(r"\b\d{5}\b", "VALUE", text)).replace("assgined", "assigned")
        return sorted(
            line.strip() for line in re.split(r"\s*\n\s*|(?<=again\.) (?=VAR)|(?<=NAME|ALUE) +(?=The|VAR)", text)
        )

    assert blank(text) == blank("Memorize" + asked)
    example, names = theirs.vt_utils.generate_input_output(solved.count("grass"), 1, 4, is_icl=True)
    assert blank(example + " ".join(names)) == blank(solved.replace("they are:  ", "they are: "))


@pytest.mark.parametrize("length", [2048, 4096])
def test_common_words(length, theirs, material):
    example, text, answers = theirs.cwe_utils.generate_input_output(57, length)
    sample = ours("cwe", 57, material, length)
    assert set(solve(text)) == set(answers)
    our_example, our_text = sample.prompt.split("\nBelow")

    def counts(text):
        frame, listed = (
            re.split(r"(?<=often\.\n).*(?=\nQuestion)", text),
            re.search(r"often\.\n(.*)\nQuestion", text)[1],
        )
        found = collections.Counter(re.split(r" ?\d+\. ", listed)[1:])
        return [re.sub(r"\d+\. [^\d]+", "", part).rstrip() for part in frame], sorted(found.values())

    assert counts(text) == counts("Below" + our_text)
    assert counts(example.replace("list are:", "list are: ")) == counts(our_example)


def test_frequent_words(theirs, material):
    length, words = 4096, 601
    room = length - definition.FREQUENT_WORDS.max_tokens
    tokenizer = lambda text: types.SimpleNamespace(input_ids=list(text.encode()))  # noqa: E731
    text, answers, _ = theirs.fwe_utils.generate_input_output(10**6, tokenizer, words, vocab_size=room // 50)
    sample = ours("fwe", words, material, length)
    assert set(solve(text)) == set(answers)

    def counts(text):
        frame = re.split(r"(?<=coded words\. ).*(?=\nQuestion)", text)
        return frame, sorted(collections.Counter(re.search(r"coded words\. (.*)\n", text)[1].split()).values())

    assert counts(text) == counts(sample.prompt)


@pytest.mark.parametrize(
    ("name", "dataset", "content"), [("qa_1", "squad", squad(4, 3)), ("qa_2", "hotpotqa", hotpotqa())]
)
def test_questions(name, dataset, content, theirs, material, monkeypatch):
    monkeypatch.setattr(theirs.qa_utils, "download_json", lambda _: content)
    questions, documents = getattr(theirs.qa_utils, f"read_{dataset}").__wrapped__()
    found = material.questions[dataset]
    assert documents == found.documents
    assert [(q["query"], q["outputs"], q["context"], sorted(q.get("more_context", []))) for q in questions] == [
        (q.text, list(q.answers), list(q.answered_by), sorted(q.related)) for q in found.questions
    ]

    def parts(text):
        before, *documents, after = re.split(
            r"Document \d+:\n|\n\n(?=Answer)", text.replace("\n\nDocument", "\nDocument")
        )
        return before, sorted(document.strip() for document in documents), after

    for size in (2, 3):  # the question's own documents and, of SQuAD, others of its article
        if dataset == "squad" or size == 2:
            text, _ = theirs.qa_utils.generate_input_output(1, size, questions, documents)
            sample = ours(name, size, material, index=1)
            own, rest = parts(text), parts(sample.question)
            assert (own[0], own[2:]) == (rest[0], rest[2:])
            assert len(own[1]) == len(rest[1])
            if size == (3 if dataset == "squad" else 2):
                assert own[1] == rest[1]


def test_scores(theirs):
    answers = ["Rome", "1234567", "a\nb"]
    for output in ("", "ROME", "rome 1234567", " a\x02b rome\x00 1234567 ", "12345678"):
        doc = {"outputs": answers, "max_length": 4096}
        assert theirs.common_utils.process_results(doc, [output])["4096"] == string_match(output, answers, False)
    doc = {"outputs": ["the color", "color"], "max_length": 4096}
    for output, score, their_score in (("Color!", 1.0, 0.5), ("the color", 1.0, 1.0), ("none", 0.0, 0.0)):
        assert string_match(output, doc["outputs"], True) == score
        assert theirs.common_utils.process_results_part(doc, [output])["4096"] == their_score


def test_their_sizes(theirs):
    """fwe is sized without room for the answer: prompt and answer exceed the length."""
    tokenizer = lambda text: types.SimpleNamespace(input_ids=list(text.encode()))  # noqa: E731
    over = [theirs.fwe_utils.sys_kwext(tokenizer, n, num_samples=1)[0]["length"] - n for n in range(2000, 2600, 64)]
    assert 0 < max(over) <= 50
