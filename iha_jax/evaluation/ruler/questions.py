"""Questions of SQuAD and HotpotQA files and the documents that answer them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Question:
    """`answered_by` and `related` are indices of documents: those that hold the answer, and others of its article."""

    text: str
    answers: tuple[str, ...]
    answered_by: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class Questions:
    """Documents are sorted and distinct; questions are in the file's order."""

    documents: Sequence[str]
    questions: Sequence[Question]


def read_squad(content: Any) -> Questions:
    """SQuAD 2.0: {"data": [{"paragraphs": [{"context", "qas": [{"question", "is_impossible", "answers"}]}]}]}.

    Questions marked impossible are left out. Raises ValueError naming the record and field that is not as expected.
    """
    articles = _field(content, "data", list, "the file")
    paragraphs = [
        [(f"data[{i}].paragraphs[{j}]", p) for j, p in enumerate(_field(article, "paragraphs", list, f"data[{i}]"))]
        for i, article in enumerate(articles)
    ]
    contexts = [[_field(p, "context", str, where) for where, p in article] for article in paragraphs]
    documents = sorted({context for article in contexts for context in article})
    number = {document: i for i, document in enumerate(documents)}
    questions = []
    for article, texts in zip(paragraphs, contexts, strict=True):
        for (where, paragraph), context in zip(article, texts, strict=True):
            own = number[context]
            related = tuple(dict.fromkeys(number[text] for text in texts if number[text] != own))
            for k, asked in enumerate(_field(paragraph, "qas", list, where)):
                at = f"{where}.qas[{k}]"
                text = _field(asked, "question", str, at)
                if asked.get("is_impossible", False):
                    continue
                answers = [
                    _field(answer, "text", str, f"{at}.answers[{n}]")
                    for n, answer in enumerate(_field(asked, "answers", list, at))
                ]
                questions.append(Question(text, _answers(answers, at), (own,), related))
    return _some(documents, questions)


def read_hotpotqa(content: Any) -> Questions:
    """HotpotQA: [{"question", "answer", "context": [[title, [sentence, ...]], ...]}]; a document is title and text.

    Raises ValueError naming the record and field that is not as expected.
    """
    if not isinstance(content, list):
        raise ValueError(f"expected a list of records, found {type(content).__name__}")
    read = []
    for i, record in enumerate(content):
        at = f"record {i}"
        context = _field(record, "context", list, at)
        try:
            texts = [f"{title}\n{''.join(sentences)}" for title, sentences in context]
        except (TypeError, ValueError) as error:
            raise ValueError(f'{at}: field "context" is not a list of [title, [sentence, ...]]') from error
        if not texts:
            raise ValueError(f'{at}: field "context" is empty')
        read.append((_field(record, "question", str, at), _answers([_field(record, "answer", str, at)], at), texts))
    documents = sorted({text for _, _, texts in read for text in texts})
    number = {document: i for i, document in enumerate(documents)}
    return _some(
        documents,
        [Question(text, answers, tuple(number[text] for text in texts)) for text, answers, texts in read],
    )


def _field(record: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f'{where}: no field "{name}"')
    if not isinstance(record[name], kind):
        raise ValueError(f'{where}: field "{name}" is {type(record[name]).__name__}, expected {kind.__name__}')
    return record[name]


def _answers(answers: Sequence[str], where: str) -> tuple[str, ...]:
    if not answers or not all(answers):
        raise ValueError(f"{where}: an answer is missing or empty, and every output would contain it")
    return tuple(answers)


def _some(documents: Sequence[str], questions: Sequence[Question]) -> Questions:
    if not questions:
        raise ValueError("no question that has an answer in it")
    return Questions(documents, questions)
