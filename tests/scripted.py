"""A model that says what it is told, for the tests of tasks."""

import json
from types import SimpleNamespace

import pytest

from iha_jax.data.tokenizers import Bytes
from iha_jax.evaluation.text_model import Completion, Sample


class Scripted:
    """Answers prompt i with texts[i], a text a sample; keeps what it was asked."""

    tokenizer = Bytes()
    context_length = 4096

    def __init__(self, texts):
        self.texts, self.prompts, self.sampling = texts, [], None

    def complete(self, prompts, sampling):
        self.prompts, self.sampling = list(prompts), sampling
        return [
            Completion(len(prompt), 2 * i, tuple(Sample(text, (), "length" if i else "stop") for text in texts))
            for i, (prompt, texts) in enumerate(zip(prompts, self.texts, strict=True))
        ]

    def score(self, requests):
        raise AssertionError("not asked for")


def unasked():
    """A model that must not be asked."""
    return SimpleNamespace(complete=lambda *_: pytest.fail("generated before it was clear that it can be judged"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
