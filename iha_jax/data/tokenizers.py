"""Tokenizers behind one small interface: bytes, a Hugging Face `tokenizer.json`, a SentencePiece model."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath


class Tokenizer(Protocol):
    """Text to token ids and back. `document_id` separates documents; `digest` names exactly this tokenizer.

    Text never becomes `document_id` or another special token, whatever it says.
    """

    spec: str
    vocab_size: int
    document_id: int
    digest: str
    byte_lengths: np.ndarray  # [vocab_size] int32: UTF-8 bytes a token stands for, 0 for special tokens

    def encode(self, text: bytes | str) -> np.ndarray: ...

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]: ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer of `spec`: "bytes", "hf:/path/tokenizer.json", or "sp:/path/x.model"; a path may be a bucket's.

    Raises:
      ValueError: for another spec, a missing or unreadable file, or a missing library (naming the extra to install).
    """
    if spec == "bytes":
        return Bytes()
    kind, _, path = spec.partition(":")
    loader = {"hf": HuggingFace, "sp": SentencePiece}.get(kind)
    if loader is None or not path:
        raise ValueError(f"tokenizer = {spec!r}: expected 'bytes', 'hf:/path/tokenizer.json', or 'sp:/path/x.model'")
    file = epath.Path(path).expanduser()
    if not file.exists() or file.is_dir():
        raise ValueError(f"tokenizer = {spec!r}: no file {path}")
    try:
        return loader(spec, file.read_bytes())
    except ImportError as error:
        raise ValueError(
            f"tokenizer = {spec!r} needs a library that is not installed: pip install 'iha_jax[tokenizers]'"
        ) from error


def encode_checked(tokenizer: Tokenizer, texts: Sequence[bytes]) -> list[np.ndarray]:
    """The token ids of each text. Raises ValueError when one is outside the tokenizer's own vocabulary."""
    encoded = tokenizer.encode_batch(texts)
    for tokens in encoded:
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
            found = f"{tokens.min()} to {tokens.max()}"
            raise ValueError(f"the tokenizer gave ids {found}; its vocabulary has {tokenizer.vocab_size}")
    return encoded


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

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")


def _text(text: bytes | str) -> str:
    return text if isinstance(text, str) else text.decode()


class HuggingFace:
    """A `tokenizer.json` through `tokenizers`. Its end-of-text token, else a new id, separates documents."""

    SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")

    def __init__(self, spec: str, model: bytes):
        import tokenizers

        library: Any = tokenizers.Tokenizer  # its stubs lack some of what is used here
        try:
            self._library = library.from_str(model.decode())
        except Exception as error:  # the library raises bare Exception for malformed files
            raise ValueError(f"tokenizer = {spec!r}: cannot be read as a tokenizer.json: {error}") from error
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True  # "<|endoftext|>" in a text is text, not a separator
        self.spec = spec
        self.digest = hashlib.sha256(model).hexdigest()
        ids = self._library.get_vocab(with_added_tokens=True)
        size = max(ids.values(), default=-1) + 1  # ids may have gaps
        self.document_id = next((ids[name] for name in self.SEPARATORS if name in ids), size)
        self.vocab_size = max(size, self.document_id + 1)
        self.byte_lengths = np.zeros(self.vocab_size, np.int32)
        for token, length in _huggingface_lengths(json.loads(self._library.to_str()), ids):
            self.byte_lengths[ids[token]] = length
        self.byte_lengths[self.document_id] = 0

    def encode(self, text: bytes | str) -> np.ndarray:
        return np.asarray(self._library.encode(_text(text), add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        found = self._library.encode_batch_fast([_text(text) for text in texts], add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._library.decode([int(i) for i in ids if i != self.document_id])


def _huggingface_lengths(settings: dict[str, Any], ids: Iterable[str]) -> Iterator[tuple[str, int]]:
    """(token, UTF-8 bytes of the text it stands for), told from the parts a `tokenizer.json` is made of.

    ByteLevel vocabularies write each byte as one character. Others write text, with U+2581 for a space; with byte
    fallback `<0xAB>` is one byte; WordPiece's "##" (the continuing prefix) stands for nothing, and an end-of-word
    suffix for the space that it replaces. Special and unknown tokens stand for nothing; other added tokens are text.
    """
    added = {token["content"]: token["special"] for token in settings["added_tokens"]}
    model = settings["model"]
    parts = list(_types(settings["pre_tokenizer"])) + list(_types(settings["decoder"]))
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    for token in ids:
        if token in added:
            yield token, 0 if added[token] else len(token.encode())
        elif token == model.get("unk_token"):
            yield token, 0
        elif model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            yield token, 1
        elif "ByteLevel" in parts:
            yield token, len(token)
        else:
            text = token.removeprefix(prefix)
            if suffix and text.endswith(suffix):
                text = text.removesuffix(suffix) + " "
            yield token, len(text.replace("\u2581", " ").encode())


def _types(part: Any) -> Iterator[str]:
    """The types of a pre-tokenizer or decoder, and of those it is a sequence of."""
    if isinstance(part, dict):
        yield part["type"]
        for inner in part.get("pretokenizers", []) + part.get("decoders", []):
            yield from _types(inner)


class SentencePiece:
    """A SentencePiece model. Its end-of-sentence id, else a new id, separates documents."""

    def __init__(self, spec: str, model: bytes):
        from sentencepiece import SentencePieceProcessor

        try:
            self._library = SentencePieceProcessor()
            self._library.LoadFromSerializedProto(model)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"tokenizer = {spec!r}: cannot be read as a SentencePiece model: {error}") from error
        self.spec = spec
        self.digest = hashlib.sha256(model).hexdigest()
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

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        found: Any = self._library.EncodeAsIds([_text(text) for text in texts])
        return [np.asarray(ids, np.int32) for ids in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._library.DecodeIds([int(i) for i in ids if i != self.document_id])
