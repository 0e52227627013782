"""Tokenizers: text comes back, every byte is counted once, and no text becomes a separator."""

import json
from pathlib import Path

import numpy as np
import pytest

from iha_jax.data.tokenizers import load_tokenizer
from tests.tiny_tokenizers import TEXTS, huggingface, sentencepiece

LOSSLESS = {
    "bytes": lambda folder: "bytes",
    "byte-level": lambda folder: huggingface("byte-level", folder),
    "byte-fallback": lambda folder: huggingface("byte-fallback", folder),
    "sentencepiece": sentencepiece,
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_text_comes_back_and_every_byte_is_counted_once(kind, tmp_path):
    tokenizer = load_tokenizer(LOSSLESS[kind](tmp_path))
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    assert tokenizer.byte_lengths[tokenizer.document_id] == 0
    batch = tokenizer.encode_batch([text.encode() for text in TEXTS])
    for text, together in zip(TEXTS, batch, strict=True):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, together)
        np.testing.assert_array_equal(ids, tokenizer.encode(text.encode()))
        assert tokenizer.document_id not in ids  # whatever the text says
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.document_id, *ids, tokenizer.document_id]) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.decode(tokenizer.encode("")) == ""


def test_a_tokenizer_without_a_separator_gets_one(tmp_path):
    tokenizer = load_tokenizer(huggingface("unigram", tmp_path))
    assert tokenizer.document_id == tokenizer.vocab_size - 1
    without = load_tokenizer(sentencepiece(tmp_path, eos_id=-1))
    assert without.document_id == without.vocab_size - 1
    assert load_tokenizer(sentencepiece(tmp_path, eos_id=2)).document_id == 2


def test_vocabularies_that_are_not_byte_level_are_counted_as_text(tmp_path):
    """Latin-1 letters are two bytes there, not one; a token that looks like a byte is six; "##" stands for nothing."""
    unigram = load_tokenizer(huggingface("unigram", tmp_path))
    for text in ("é", "¡", "plain"):
        assert unigram.byte_lengths[unigram.encode(text)].sum() == len(text.encode())
    wordpiece = load_tokenizer(huggingface("wordpiece", tmp_path))
    text = "plain textpl twice é"
    ids = wordpiece.encode(text)
    assert len(ids) > 4  # of which some continue a word
    assert wordpiece.byte_lengths[ids].sum() == len(text.replace(" ", "").encode())  # this kind drops spaces
    settings = json.loads((tmp_path / "wordpiece.json").read_text())
    settings["model"]["vocab"] |= {"<0xAB>": len(settings["model"]["vocab"])}
    (tmp_path / "odd.json").write_text(json.dumps(settings))
    odd = load_tokenizer(f"hf:{tmp_path / 'odd.json'}")
    assert odd.byte_lengths[settings["model"]["vocab"]["<0xAB>"]] == 6


def test_the_digest_names_the_tokenizer(tmp_path):
    first, second = huggingface("byte-level", tmp_path), huggingface("wordpiece", tmp_path)
    digests = {load_tokenizer(spec).digest for spec in ("bytes", first, second)}
    assert len(digests) == 3
    copy = tmp_path / "elsewhere.json"
    copy.write_bytes(Path(first.removeprefix("hf:")).read_bytes())
    assert load_tokenizer(f"hf:{copy}").digest == load_tokenizer(first).digest


@pytest.mark.parametrize("spec", ["", "byte", "hf:", "hf:/no/such.json", "sp:/", "hf:{0}/junk", "sp:{0}/junk"])
def test_unusable_tokenizers_are_refused(spec, tmp_path):
    (tmp_path / "junk").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer = "):
        load_tokenizer(spec.format(tmp_path))
