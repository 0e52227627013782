"""Tasks of lm-evaluation-harness, from local files, on a scripted and on a tiny real model; nothing is downloaded."""

import json
import math

import jax
import numpy as np
import pytest

from iha_jax.config import MeshConfig
from iha_jax.data.tokenizers import load_tokenizer
from iha_jax.evaluation.scoring import Scorer, rolling_log_likelihoods
from iha_jax.evaluation.tasks import Options, load_task
from iha_jax.evaluation.text_model import Completion, Sample, Sampling, Score
from iha_jax.model import initialize
from iha_jax.parallel.mesh import make_mesh
from tests.tiny import tiny

pytest.importorskip("lm_eval")

from iha_jax.evaluation.harness_model import HarnessModel, sampling

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/sums.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 7, do_sample: false, temperature: 0.0}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1.0}}
"""
CHOICES = [
    {"question": "a", "choices": ["b", "cc"], "answer": 0},
    {"question": "aa", "choices": ["bbbb", "c"], "answer": 0},
    {"question": "aaa", "choices": ["bb", "c"], "answer": 1},
]
TEXTS = [{"text": "one two three"}, {"text": "four five"}]
SUMS = [{"question": "1+1=", "answer": "2"}, {"question": "2+3=", "answer": "5"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    for name, rows in (("choice", CHOICES), ("texts", TEXTS), ("sums", SUMS)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("generate", GENERATE)):
        (path / f"{name}.yaml").write_text(text.format(folder=path))
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


class Scripted:
    """ln p = -len(continuation)^2 / 4 - len(context) / 100; answers "2" to everything."""

    tokenizer = load_tokenizer("bytes")
    context_length = 5

    def __init__(self):
        self.asked, self.scored = [], []

    def complete(self, prompts, sampling):
        self.asked.append((list(prompts), sampling))
        return [Completion(len(prompt), 3, (Sample("2", (50,), "stop"),)) for prompt in prompts]

    def score(self, requests):
        self.scored += [(a.tolist(), b.tolist()) for a, b in requests]
        return [Score(-(len(b) ** 2) / 4 - len(a) / 100, len(b) < 3, len(a) // 3) for a, b in requests]


def run(name, model, folder, **options):
    return load_task(f"lm_eval:{name}")(model, Options(data={"lm_eval": str(folder)}, **options))


def test_multiple_choice(folder):
    # The likelier choice is the shorter one: the first, the second, the second. By bytes it is the shorter one too.
    model = Scripted()
    found = run("tiny_choice", model, folder)
    assert found.metrics == pytest.approx({"acc": 2 / 3, "acc_norm": 2 / 3})
    half = 4.302652729911275 * math.sqrt(2 / 9 / 3 * 3 / 2)  # t(0.975, 2) s / sqrt(3), s^2 = (2/9) 3/2
    assert found.intervals["acc"] == pytest.approx((2 / 3 - half, 2 / 3 + half))
    assert model.scored[:2] == [(list(b"a"), list(b" b")), (list(b"a"), list(b" cc"))]
    assert [record["acc"] for record in found.records] == [1.0, 0.0, 1.0]
    assert json.loads(json.dumps(found.records)) == list(found.records)
    assert found.records[0]["doc"] == CHOICES[0]
    # One of three context tokens is dropped (len // 3), in both requests of the last example.
    assert found.counts == {"cut_requests": 2, "dropped_tokens": 2}
    assert found.settings["examples"] == {"tiny_choice": {"original": 3, "effective": 3}}


def test_limit_and_shots(folder):
    model = Scripted()
    found = run("tiny_choice", model, folder, limit=1)
    assert [record["acc"] for record in found.records] == [1.0]
    assert found.intervals["acc"] == pytest.approx((1 / (1 + 1.959963984540054**2), 1.0))  # Wilson's, 1 of 1
    seen = run("tiny_choice", Scripted(), folder, shots=1).records[0]["arguments"][0][0]
    assert seen.removesuffix("\n\na") in ("aa b b".replace("b b", "bbbb"), "aaa c")  # another example, solved


def test_rolling(folder):
    found = run("tiny_rolling", Scripted(), folder)
    # 13 bytes in windows of 5, 5, 3: contexts 0, 1, 3; 9 bytes in 5, 4: contexts 0, 2.
    total = -(25 + 25 + 9) / 4 - 0.04 - (25 + 16) / 4 - 0.02
    assert found.metrics["bits_per_byte"] == pytest.approx(-total / 22 / math.log(2))
    assert found.metrics["byte_perplexity"] == pytest.approx(math.exp(-total / 22))
    assert found.metrics["word_perplexity"] == pytest.approx(math.exp(-total / 5))
    assert all(math.isnan(end) for end in found.intervals["word_perplexity"])


def test_generation(folder):
    model = Scripted()
    found = run("tiny_generate", model, folder, seed=4)
    assert found.metrics == {"exact_match": 0.5}
    assert model.asked == [(["1+1=", "2+3="], Sampling(max_tokens=7, stop=("\n",), seed=4))]
    assert found.counts["dropped_tokens"] == 6
    run("tiny_generate", model, folder, temperature=0.5, max_tokens=3, top_k=2)
    assert model.asked[-1][1] == Sampling(max_tokens=3, temperature=0.5, top_k=2, stop=("\n",))


def test_a_real_model_gives_its_own_scores(folder):
    config = tiny(model__compute_dtype="float32", model__layer_pattern=("iha_local", "mha"), model__num_layers=2).model
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, context=1, tensor=1), jax.devices()[:1])
    scorer = Scorer(config, initialize(config, jax.random.key(0)), 256, mesh, batch_size=4)

    class Model(Scripted):
        context_length = config.context_length

        def score(self, requests):
            return scorer.score(requests)

    model = Model()
    encode = model.tokenizer.encode
    pairs = [(encode(row["question"]), encode(" " + choice)) for row in CHOICES for choice in row["choices"]]
    scores = [score.log_likelihood for score in scorer.score(pairs)]
    best = [int(np.argmax(scores[i : i + 2])) for i in (0, 2, 4)]
    expected = np.mean([best[i] == row["answer"] for i, row in enumerate(CHOICES)])
    assert run("tiny_choice", model, folder).metrics["acc"] == pytest.approx(expected)
    total = sum(rolling_log_likelihoods(model, [encode(row["text"]) for row in TEXTS]))
    assert run("tiny_rolling", model, folder).metrics["bits_per_byte"] == pytest.approx(-total / 22 / math.log(2))


def test_an_empty_context_is_the_beginning_of_a_document():
    from lm_eval.api.instance import Instance

    model = Scripted()
    instance = Instance(request_type="loglikelihood", doc={}, arguments=("", "xy"), idx=0)
    assert HarnessModel(model).loglikelihood([instance]) == [(-1.0, True)]
    assert model.scored == [([], list(b"xy"))]


def test_generation_arguments():
    assert sampling({}) == Sampling()
    assert sampling({"until": "x", "max_new_tokens": 3, "temperature": 0.7, "top_p": 0.9, "do_sample": True}) == (
        Sampling(max_tokens=3, temperature=0.7, top_p=0.9, stop=("x",))
    )
    assert sampling({"do_sample": True}).temperature == 1.0
    assert sampling({"do_sample": False, "temperature": 0.7}).temperature == 0.0
    with pytest.raises(ValueError, match="num_beams not understood; expected until, max_gen_toks"):
        sampling({"num_beams": 4})
    with pytest.raises(ValueError, match=r"max_gen_toks.*many"):
        sampling({"max_gen_toks": "many"})


def test_refusals(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such folder"):
        run("tiny_choice", Scripted(), tmp_path / "none")
    with pytest.raises(ValueError, match="samples = 2"):
        run("tiny_choice", Scripted(), folder, samples=2)
    (tmp_path / "gone.yaml").write_text(CHOICE.format(folder=tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"lm_eval:tiny_choice: its data cannot be read: .*choice.jsonl"):
        run("tiny_choice", Scripted(), tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'iha_jax\[eval\]'"):
        run("tiny_choice", Scripted(), folder)


@pytest.mark.slow  # reads the names of all the harness's tasks
def test_an_unknown_task_is_told_near_ones(folder):
    with pytest.raises(ValueError, match="lm_eval has no task 'tiny_choise'; near ones: tiny_choice"):
        run("tiny_choise", Scripted(), folder)


def test_conversations(folder):
    chat = pytest.importorskip("iha_jax.data.chat")
    model = Scripted()
    run("tiny_generate", model, folder, chat=True)
    prompts, how = model.asked[0]
    assert prompts == [chat.prompt_text([{"role": "user", "content": row["question"]}]) for row in SUMS]
    assert how.stop == ("\n", chat.END_OF_TURN)
    run("tiny_generate", model, folder, chat=True, shots=1)
    solved = [{"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}]
    assert model.asked[1][0][0] == chat.prompt_text([*solved, {"role": "user", "content": "1+1="}])
