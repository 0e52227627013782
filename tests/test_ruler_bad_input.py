"""RULER: options and files that are refused, by name."""

import json

import pytest

from iha_jax.evaluation.ruler.material import load_material
from iha_jax.evaluation.tasks import Options, load_task
from tests.ruler_prompts import Scripted, hotpotqa


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("ruler", {"lengths": (4097, 256)}, r"lengths \[4097\]: expected 1 to 4096"),
        ("ruler", {"lengths": (256,)}, r"no RULER task can run: .*niah_single_1\S* needs \d+ tokens at least"),
        ("ruler:qa_2", {}, r"hotpot_dev_distractor_v1.json: give --data=hotpotqa=FILE"),
        ("ruler:niah", {}, "no RULER task 'niah'; expected one of niah_single_1, .* qa_2"),
        ("ruler", {"data": {"essays": "/none.txt"}}, "--data=essays=/none.txt: cannot be read: No such file"),
        ("ruler:vt", {"limit": 0}, "limit = 0"),
    ],
)
def test_refused_options(task, options, words):
    with pytest.raises(ValueError, match=words):
        load_task(task)(Scripted(lambda _: ""), Options(**options))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("squad", "{", "Expecting property name"),
        ("squad", "[]", 'the file: no field "data"'),
        ("squad", {"data": [{"paragraphs": [{"context": 3}]}]}, r'data\[0\].paragraphs\[0\]: field "context" is int'),
        (
            "squad",
            {"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "b"}]}]}]},
            r'qas\[0\]: no .*"answers"',
        ),
        ("squad", {"data": []}, "no question"),
        ("hotpotqa", {}, "expected a list of records, found dict"),
        ("hotpotqa", [*hotpotqa(1), {"question": "?", "answer": "a"}], 'record 1: no field "context"'),
        ("hotpotqa", [hotpotqa(1)[0] | {"context": [["title"]]}], "record 0.*sentence"),
        ("hotpotqa", [hotpotqa(1)[0] | {"answer": ""}], "record 0: an answer is missing or empty"),
        ("essays", " \n", "no words"),
    ],
)
def test_malformed_files_name_the_record(name, content, words, tmp_path):
    path = tmp_path / "file"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=f"--data={name}={path}.*{words}"):
        load_material(frozenset([name]), {name: str(path)})
