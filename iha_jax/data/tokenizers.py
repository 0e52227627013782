"""Tokenizers behind one small interface: bytes, a Hugging Face `tokenizer.json`, a SentencePiece model."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Text to token ids and back. `document_id` separates documents; `digest` names exactly this tokenizer."""

    spec: str
    vocab_size: int
    document_id: int
    digest: str
    byte_lengths: np.ndarray  # [vocab_size] int32: UTF-8 bytes a token stands for, 0 for special tokens

    def encode(self, text: bytes | str) -> np.ndarray: ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer of `spec`: "bytes", "hf:/path/tokenizer.json", or "sp:/path/x.model".

    Raises:
      ValueError: for another spec, a missing or unreadable file, or a missing library (naming the extra to install).
    """
    if spec == "bytes":
        return Bytes()
    kind, _, path = spec.partition(":")
    loader = {"hf": HuggingFace, "sp": SentencePiece}.get(kind)
    if loader is None or not path:
        raise ValueError(f"tokenizer = {spec!r}: expected 'bytes', 'hf:/path/tokenizer.json', or 'sp:/path/x.model'")
    if not Path(path).is_file():
        raise ValueError(f"tokenizer = {spec!r}: no file {path}")
    try:
        return loader(spec, path)
    except ImportError as error:
        raise ValueError(
            f"tokenizer = {spec!r} needs a library that is not installed: pip install 'iha_jax[tokenizers]'"
        ) from error


class Bytes:
    """UTF-8 bytes are ids 0 to 255; 256 separates documents."""

    spec = "bytes"
    vocab_size = 257
    document_id = 256
    digest = hashlib.sha256(b"bytes: 0..255, document separator 256").hexdigest()

    def __init__(self) -> None:
        self.byte_lengths = np.ones(257, np.int32)
        self.byte_lengths[self.document_id] = 0

    def encode(self, text: bytes | str) -> np.ndarray:
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")


def _text(text: bytes | str) -> str:
    return text if isinstance(text, str) else text.decode()


class HuggingFace:
    """A `tokenizer.json` through `tokenizers`. Its end-of-text token, else a new id, separates documents."""

    SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")

    def __init__(self, spec: str, path: str):
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_file(path)
        except Exception as error:  # the library raises bare Exception for malformed files
            raise ValueError(f"tokenizer = {spec!r}: cannot be read as a tokenizer.json: {error}") from error
        self.spec = spec
        self.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        size = self._library.get_vocab_size()
        found = [i for i in map(self._library.token_to_id, self.SEPARATORS) if i is not None]
        self.document_id = found[0] if found else size
        self.vocab_size = max(size, self.document_id + 1)
        specials = {i for i, token in self._library.get_added_tokens_decoder().items() if token.special}
        self.byte_lengths = np.zeros(self.vocab_size, np.int32)
        for i in set(range(size)) - specials - {self.document_id}:
            self.byte_lengths[i] = _byte_level_length(self._library.id_to_token(i) or "")

    def encode(self, text: bytes | str) -> np.ndarray:
        return np.asarray(self._library.encode(_text(text), add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._library.decode([int(i) for i in ids if i != self.document_id])


def _byte_level_length(token: str) -> int:
    """Bytes of a token's text. Byte-level vocabularies write each byte as one character below U+0144;
    SentencePiece-like ones write `<0xAB>` for a byte and U+2581 for a space."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    if all(ord(c) < 0x144 for c in token):
        return len(token)
    return len(token.replace("\u2581", " ").encode())


class SentencePiece:
    """A SentencePiece model. Its end-of-sentence id, else a new id, separates documents."""

    def __init__(self, spec: str, path: str):
        from sentencepiece import SentencePieceProcessor

        try:
            self._library = SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"tokenizer = {spec!r}: cannot be read as a SentencePiece model: {error}") from error
        self.spec = spec
        self.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        size = self._library.GetPieceSize()
        eos = self._library.eos_id()
        self.document_id = eos if eos >= 0 else size
        self.vocab_size = max(size, self.document_id + 1)
        self.byte_lengths = np.zeros(self.vocab_size, np.int32)
        for i in range(size):
            if not (self._library.IsControl(i) or self._library.IsUnknown(i) or i == self.document_id):
                piece = self._library.IdToPiece(i)
                self.byte_lengths[i] = 1 if self._library.IsByte(i) else len(piece.replace("\u2581", " ").encode())

    def encode(self, text: bytes | str) -> np.ndarray:
        return np.asarray(self._library.EncodeAsIds(_text(text)), np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._library.DecodeIds([int(i) for i in ids if i != self.document_id])
