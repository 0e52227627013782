"""RULER: lengths, answers that are in the prompts, scores, bad input."""

import collections
import dataclasses
import hashlib
import importlib.resources
import itertools
import json
import re

import pytest

from iha_jax.data.tokenizers import Bytes, load_tokenizer
from iha_jax.evaluation.ruler.definition import SUBTASKS
from iha_jax.evaluation.ruler.length import largest_fitting
from iha_jax.evaluation.ruler.material import load_material, made_words
from iha_jax.evaluation.ruler.sample import Draw
from iha_jax.evaluation.ruler.scoring import average_interval, string_match
from iha_jax.evaluation.ruler.task import GENERATORS, DoesNotFitError
from iha_jax.evaluation.tasks import Options, load_task
from tests import tiny_tokenizers
from tests.ruler_prompts import Scripted, first, hotpotqa, solve, solve_one, squad

NAMES = list(SUBTASKS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    files = {"squad": folder / "squad.json", "hotpotqa": folder / "hotpotqa.json", "essays": folder / "essays.txt"}
    files["squad"].write_text(json.dumps(squad()))
    files["hotpotqa"].write_text(json.dumps(hotpotqa()))
    files["essays"].write_text("One idea is this.  Another is\nnot! (Is it?) So it goes on, and so on. " * 7)
    return {name: str(path) for name, path in files.items()}


@pytest.fixture(scope="module")
def material(data):
    return load_material(frozenset(["words", "essays", "squad", "hotpotqa"]), data)


@pytest.fixture(scope="module", params=["bytes", "byte-level"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return Bytes()
    return load_tokenizer(tiny_tokenizers.huggingface(request.param, tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("name", NAMES)
def test_prompts_hold_their_answers_and_have_the_length_asked_for(name, tokenizer, material):
    task, length = SUBTASKS[name], 2111
    found = first(name, length, tokenizer, material)
    assert len(found) == 3
    for sized in found:
        assert sorted(solve(sized.prompt)) == sorted(sized.sample.answers[: 1 if task.wording.any_answer else None])
        room = length - 1 - task.wording.max_tokens
        assert sized.prompt_tokens == len(tokenizer.encode(sized.prompt)) <= room
        draw = Draw(name, length, sized.index, 0, lambda text: len(tokenizer.encode(text)), material)
        growing = GENERATORS[type(task)](task, draw)
        assert growing.at(sized.size).prompt == sized.prompt
        assert len(tokenizer.encode(growing.at(sized.size + 1).prompt)) > room


@pytest.mark.parametrize("name", ["cwe", "vt", "niah_multiquery", "fwe"])
def test_lengths_of_4096_and_more_too(name, material):
    [sized] = first(name, 7001, Bytes(), material, count=1)
    assert sorted(solve(sized.prompt)) == sorted(sized.sample.answers)
    if name == "cwe":  # 30 and 3 times, after an example of 10 and 3
        example, asked = re.findall(r"most often\.\n(.*)\nQuestion", sized.prompt)
        for text, expected in ((example, {10, 3}), (asked, {30, 3})):
            counts = collections.Counter(re.split(r" ?\d+\. ", text)[1:])
            assert set(counts.values()) == expected
            assert sum(count == max(expected) for count in counts.values()) == 10
    if name == "vt":
        assert len(Bytes().encode(sized.prompt.split("\n\nMemorize")[0])) > 500  # five lines of noise at least


@pytest.mark.parametrize("name", NAMES)
def test_samples_depend_on_seed_and_index_alone(name, material):
    prompts = [
        [s.prompt for s in first(name, 2048, Bytes(), material, count, seed=seed)]
        for count, seed in ((3, 0), (2, 0), (3, 7))
    ]
    assert prompts[0][:2] == prompts[1]
    assert len({*prompts[0], *prompts[2]}) == 6


def test_the_wording_is_the_published_one():
    """The digest is that of the texts in NVIDIA/RULER at c3f5e3b, with this project's names of the fields."""
    texts = "".join(
        f"{wording.template}{wording.answer_prefix}{wording.max_tokens}"
        for wording in dict.fromkeys(task.wording for task in SUBTASKS.values())
    )
    assert (
        hashlib.sha256(texts.encode()).hexdigest() == "1fd272ae968f6705a44e2aec7d3f796cd8cf0c63967688c82c94fd3a2b912eb2"
    )


@pytest.mark.parametrize(
    ("name", "needles", "answers"),
    [("single_2", 1, 1), ("single_3", 1, 1), ("multikey_1", 4, 1), ("multivalue", 4, 4), ("multiquery", 4, 4)],
)
def test_how_many_needles_and_answers(name, needles, answers, material):
    [sized] = first(f"niah_{name}", 2048, Bytes(), material, count=1)
    assert sized.prompt.count("One of the special magic ") == needles
    assert len(set(sized.sample.answers)) == answers


def test_the_wording_of_small_prompts(material):
    def smallest(name):
        draw = Draw(name, 1000, 0, 0, len, material)
        growing = GENERATORS[type(SUBTASKS[name])](SUBTASKS[name], draw)
        return growing.at(growing.minimum)

    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    single = smallest("niah_single_1")
    key = re.search(r"numbers for (.+) is:", single.prompt)[1]
    assert single.prompt == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the number afterwards.\nOne of the special magic numbers for {key} is: {single.answers[0]}.\n{noise}\n"
        f"What is the special magic number for {key} mentioned in the provided text? The special magic number for "
        f"{key} mentioned in the provided text is"
    )
    assert smallest("niah_multivalue").prompt.startswith("Some special magic numbers are hidden within the following")
    query = r"numbers for [^,]+-[^,]+, [^,]+-[^,]+, [^,]+-[^,]+, and [^,]+-[^,]+ mentioned in the provided text"
    assert len(re.findall(query, smallest("niah_multiquery").prompt)) == 2
    uuids = smallest("niah_multikey_3")
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", uuids.answers[0])
    assert re.fullmatch(r"[1-9]\d{6}", single.answers[0])
    vt = smallest("vt")
    assert re.search(rf" \n{re.escape(noise)}\nVAR [A-Z]{{5}} = VAR [A-Z]{{5}} \n", vt.question)
    assert re.search(r"assigned the value \d{5}, they are:  [A-Z]{3}( [A-Z]{3}){4}\n\nMemorize", vt.question)
    assert vt.answer_prefix.endswith(", 5 variables are assigned the value " + vt.question[-24:-19] + ", they are: ")
    cwe = smallest("cwe")
    assert re.search(r"in the list are: 1\. \S.* 10\. [^\d]+\nBelow is a numbered list", cwe.question)
    assert smallest("fwe").question.endswith(
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?"
    )
    assert "documents.\n\nDocument 1:\nArticle 0, paragraph 0: the" in smallest("qa_1").prompt
    assert re.search(r"Document 1:\nTown \d\nTown \d lies.*bridges\.\n\nDocument 2:\nTown", smallest("qa_2").prompt)


def test_essays_are_repeated_and_needles_stand_between_sentences(material):
    [sized] = first("niah_multivalue", 3001, Bytes(), material, count=1)
    context = sized.sample.question.split("\n")[1]
    pieces = re.split(r" ?One of the special magic numbers for [^:]+ is: \d{7}\. ?", context)
    assert " ".join(" ".join(pieces).split()) == " ".join((list(material.essays) * 9)[: sized.size])
    assert sized.size > len(material.essays)
    ends = set()
    for sized in first("niah_multivalue", 2001, Bytes(), material, count=20):
        context = sized.sample.question.split("\n")[1]
        ends |= {
            piece.rstrip()[-6:] for piece in re.split(r"One of the special [^:]+: \d+\.", context)[:-1] if piece.strip()
        }
    assert ends == {"is it?)"[-6:], " this.", "s not!", "so on."}


def test_keys_asked_for_occur_once(material):
    few = dataclasses.replace(material.words, adjectives=["big", "red"], nouns=["cat", "dog"])
    for sized in first("niah_multikey_2", 2048, Bytes(), dataclasses.replace(material, words=few), count=9):
        assert solve(sized.prompt) == list(sized.sample.answers)
        assert sized.size > 20


def test_fwe_never_asks_for_words_that_are_equally_frequent(material):
    task = SUBTASKS["fwe"]
    for length in range(250, 1500, 83):
        growing = GENERATORS[type(task)](task, Draw("fwe", length, 0, 0, len, material))
        for size in range(growing.minimum, growing.minimum + 60):
            sample = growing.at(size)
            counts = collections.Counter(sample.question.split("coded words. ")[1].split("\nQ")[0].split())
            del counts["..."]
            ranked = [count for _, count in counts.most_common()] + [0]
            assert ranked[2] > ranked[3]
            assert {word for word, _ in counts.most_common(3)} == set(sample.answers)


def test_string_match_by_hand():
    assert string_match("The numbers are 123 and 456.", ["123", "456", "789", "12"], False) == 3 / 4
    assert string_match(" paris\x00or ROME ", ["Rome", "Oslo"], True) == 1.0
    assert string_match("a\x01b", ["a\nb"], False) == 1.0
    assert string_match("", ["x", "y"], True) == 0.0


def test_average_interval_by_hand():
    means = {"a": 0.5, "b": 0.7, "other": 1.0}
    found = average_interval({k: means[k] for k in "ab"}, {"a": (0.2, 0.9), "b": (0.3, 1.0), "other": (0, 1)})
    assert found == pytest.approx((0.6 - 0.25, 0.6 + 0.25))


@pytest.mark.parametrize(
    "count", [lambda n: 90 + 7 * n, lambda n: n // 3, lambda n: 5 * n + n * n // 50, lambda n: 2 * n + n % 2 * 3]
)
def test_the_largest_haystack_that_fits(count):
    for limit, minimum, guess in itertools.product((100, 997, 4099), (0, 3), (None, 2, 40, 1500)):
        calls = []
        found = largest_fitting(lambda n, calls=calls: (calls.append(n), count(n))[1], limit, minimum, guess)
        if count(minimum) > limit:
            assert found is None
            continue
        assert count(found) <= limit < count(found + 1)
        assert found >= minimum
        assert len(calls) == len(set(calls)) <= 20


def test_a_good_guess_costs_few_counts():
    calls = []
    assert largest_fitting(lambda n: (calls.append(n), 90 + 7 * n)[1], 10_000, 1, guess=1400) == 1415
    assert len(calls) <= 4


def test_text_that_does_not_grow_is_refused():
    with pytest.raises(ValueError, match="do not add up to 100"):
        largest_fitting(lambda n: 1, 100, 0)


@pytest.mark.parametrize(("answer", "score"), [(lambda prompt: " and ".join(solve(prompt)), 1.0), (lambda _: "", 0.0)])
def test_a_perfect_and_a_silent_model(answer, score, data):
    model = Scripted(answer)
    result = load_task("ruler")(model, Options(data=data, limit=3, lengths=(2048, 3001)))
    variants = set() if "words" not in result.settings["variants"].get("cwe", []) else {"words"}
    names = {name.split("/")[0].removesuffix("_variant") for name in result.metrics}
    assert names == {*NAMES, "average"}
    assert set(result.metrics.values()) == {score}
    assert result.metrics.keys() == result.intervals.keys()
    low, high = result.intervals[next(iter(result.metrics))]
    assert (low, high) == pytest.approx((0.4385, 1.0) if score else (0.0, 0.5615), abs=1e-4)  # Wilson, 3 of 3
    assert result.settings["variants"].keys() == (
        {n for n in NAMES if "words" in SUBTASKS[n].needs} if variants else set()
    )
    assert [sampling.max_tokens for sampling in model.calls[:13]] == [128] * 8 + [30, 120, 50, 32, 32]
    assert {(s.temperature, s.samples, s.stop) for s in model.calls} == {(0.0, 1, ())}
    record = result.records[0]
    assert (record["score"], record["dropped_tokens"], record["length"]) == (score, 0, 2048)
    assert json.dumps(result.records)
    assert json.dumps(result.settings)


def test_half_of_the_answers():
    result = load_task("ruler:niah_multikey_3")(Scripted(lambda p: solve(p)[0][:-1]), Options(limit=2))
    assert result.metrics == {"niah_multikey_3/4096": 0.0}
    result = load_task("ruler:vt")(Scripted(lambda p: " ".join(solve(p)[:2])), Options(limit=2))
    assert result.metrics == pytest.approx({"vt/4096": 0.4})


def test_conversations():
    chat = pytest.importorskip("iha_jax.data.chat")
    model = Scripted(solve_one)
    result = load_task("ruler:niah_multikey_3")(model, Options(limit=2, chat=True))
    assert result.metrics == {"niah_multikey_3/4096": 1.0}
    assert model.calls[0].stop == (chat.END_OF_TURN,)
    question, answer_prefix = model.prompts[0].split(chat.END_OF_TURN)
    assert question.startswith(chat.prompt_text([{"role": "user", "content": "A special magic uuid"}])[:-30])
    assert re.search(r"assistant\S*\n The special magic uuid for \S+ mentioned in the provided text is$", answer_prefix)
    assert 4096 - 1 - 128 - 115 < result.records[0]["prompt_tokens"] == len(model.prompts[0].encode()) <= 4096 - 1 - 128


def test_what_does_not_run_is_said(data):
    result = load_task("ruler")(Scripted(lambda _: "", 1024), Options(limit=1))  # the context, for want of 4096
    ran = [name for name in result.metrics if not name.startswith("average")]
    assert len(ran) == 9
    assert "average_of_9_variant/1024" in result.metrics  # the essays are not RULER's
    assert "niah_single_2_variant/1024" in result.metrics
    assert "essays" in result.settings["variants"]["niah_single_2"]
    assert "vt" not in result.settings["variants"]
    assert result.settings["skipped"]["qa_1"] == "needs SQuAD 2.0's dev-v2.0.json: give --data=squad=FILE"
    needed = int(re.fullmatch(r"needs (\d+) tokens at least", result.settings["skipped"]["vt/1024"])[1])
    assert first("vt", needed, Bytes(), load_material(frozenset(), {}), count=1)
    with pytest.raises(DoesNotFitError):
        first("vt", needed - 1, Bytes(), load_material(frozenset(), {}), count=1)


def test_lengths_by_default():
    def lengths(context):
        model = Scripted(lambda _: "", context)
        return load_task("ruler:niah_multikey_3")(model, Options(limit=1)).settings["lengths"]

    assert [lengths(n) for n in (1000, 4096, 16384, 20000)] == [
        [1000],
        [4096],
        [4096, 8192, 16384],
        [4096, 8192, 16384],
    ]


def test_questions_that_do_not_fit_are_left_out_and_counted(tmp_path):
    content = squad(1, 3)
    content["data"][0]["paragraphs"][0]["context"] += " more" * 200
    (tmp_path / "squad.json").write_text(json.dumps(content))
    options = Options(data={"squad": str(tmp_path / "squad.json")}, lengths=(600,))
    result = load_task("ruler:qa_1")(Scripted(solve_one), options)
    assert result.counts["questions_left_out"] == {"qa_1/600": 1}
    assert [record["index"] for record in result.records] == [1, 2]
    assert result.metrics == {"qa_1/600": 1.0}


def test_essays_as_ruler_stores_them(tmp_path):
    path = tmp_path / "PaulGrahamEssays.json"
    path.write_text(json.dumps({"text": "Some  text.\nMore."}))
    found = load_material(frozenset(["essays"]), {"essays": str(path)})
    assert (list(found.essays), found.variants) == (["Some", "text.", "More."], frozenset())
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected UTF-8 text, or JSON"):
        load_material(frozenset(["essays"]), {"essays": str(path)})


def test_words_with_and_without_the_published_lists(tmp_path, monkeypatch):
    lists = {"noun": "dog\ncat\n", "adjective": "big\nred", "verb": "run\ncat\n"}
    for kind, text in lists.items():
        (tmp_path / f"{kind}list.txt").write_text(text)
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "3")
    found = load_material(frozenset(["words"]), {})
    assert (found.words.all, found.words.nouns) == (["big", "cat", "dog", "red", "run"], ["cat", "dog"])
    assert (found.facts, found.variants) == ({"words": "wonderwords 3"}, frozenset())
    [sized] = first("cwe", 9001, Bytes(), load_lists_of(found, 40), count=1)  # goes on with made words
    assert sized.size > 40
    assert len(solve(sized.prompt)) == 10

    def absent(_):
        raise ModuleNotFoundError

    monkeypatch.setattr(importlib.resources, "files", absent)
    assert load_material(frozenset(["words"]), {}).variants == {"words"}
    made = made_words()
    assert len(set(made[:20000])) == 20000
    assert all(re.fullmatch("([bdfgklmnprstvz][aeiou]){3}", word) for word in made[:100])


def load_lists_of(material, count):
    words = dataclasses.replace(material.words, all=[f"word{i}" for i in range(count)])
    return dataclasses.replace(material, words=words)
