"""Conversations as text: how turns are written, for training and for prompts, and the two JSON layouts that are read.

A turn is `<|role|>` and a line break, its content, `<|end|>`; a line break stands between turns. These markers are
plain text, so that any tokenizer has them, bytes included; content that contains one is refused. A conversation in
training is the document separator, then its turns up to the last one of the assistant; the tokens that count in the
loss are those of the assistant's contents and the `<|end|>` after each. What the assistant writes is tokenized apart
from what stands before it, as in evaluation, where the prompt ends there.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from iha_jax.data.tokenizers import Tokenizer, encode_checked

Message = Mapping[str, str]

RENDERING = 1  # part of the digests of rows: another number whenever the text of a conversation changes
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
END_OF_TURN = "<|end|>"
ROLES = {SYSTEM: SYSTEM, USER: USER, ASSISTANT: ASSISTANT, "human": USER, "gpt": ASSISTANT}  # as written, as meant
MARKERS = (*(f"<|{role}|>" for role in (SYSTEM, USER, ASSISTANT)), END_OF_TURN)


def prompt_text(messages: Sequence[Message]) -> str:
    """The text after which the assistant writes; a model's answer ends before `END_OF_TURN`.

    `messages`: `{"role", "content"}` each, perhaps a system's first, then user and assistant in turn, a user's last.

    Raises:
      ValueError: for other messages.
    """
    _check(messages)
    if messages[-1]["role"] == ASSISTANT:
        raise ValueError("the last message is the assistant's; expected a user's, which it is to answer")
    text = "\n".join(_opening(m["role"]) + m["content"] + END_OF_TURN for m in messages)
    return f"{text}\n{_opening(ASSISTANT)}"


def conversation_text(messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """The text of a conversation in pieces, each with whether the assistant wrote it (`messages` as read)."""
    pieces, text = [], ""
    for message in messages:
        text += _opening(message["role"])
        if message["role"] == ASSISTANT:
            pieces += [(text, False), (message["content"] + END_OF_TURN, True)]
            text = "\n"
        else:
            text += message["content"] + END_OF_TURN + "\n"
    return pieces


def read_conversation(line: bytes | str) -> list[dict[str, str]]:
    """The messages of one JSON object: `{"messages": [{"role", "content"}]}`, or as OpenThoughts has it
    `{"system": ..., "conversations": [{"from", "value"}]}`; "human" and "gpt" are other names of user and assistant.

    Raises:
      ValueError: for what is not JSON, another layout, an unknown role, an empty message, messages out of turn, none of
        the assistant, or content with a marker.
    """
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    messages = _messages(record)
    _check(messages)
    if not any(message["role"] == ASSISTANT for message in messages):
        raise ValueError("no message of the assistant: nothing to learn from")
    return messages


def _messages(record: Any) -> list[dict[str, str]]:
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    name, role_key, text_key = ("messages", "role", "content")
    if name not in record:
        name, role_key, text_key = ("conversations", "from", "value")
    turns = record.get(name)
    if not isinstance(turns, list):
        raise ValueError(f"expected a list 'messages', or 'conversations'; its keys: {', '.join(record) or 'none'}")
    messages = []
    if record.get(SYSTEM):
        messages.append({"role": SYSTEM, "content": record[SYSTEM]})
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise ValueError(f"message {number} of {name!r}: expected an object with {role_key!r} and {text_key!r}")
        if not isinstance(turn[role_key], str) or turn[role_key] not in ROLES:
            raise ValueError(
                f"message {number} of {name!r}: role {turn[role_key]!r}; expected one of {', '.join(ROLES)}"
            )
        messages.append({"role": ROLES[turn[role_key]], "content": turn[text_key]})
    return messages


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise ValueError("no messages")
    expected = (SYSTEM, USER)
    for number, message in enumerate(messages, 1):
        role, content = message["role"], message["content"]
        if role not in expected:
            raise ValueError(f"message {number} is of role {role!r}; expected {' or '.join(map(repr, expected))} there")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {number} ({role}): expected text, got {content!r:.40}")
        if found := [marker for marker in MARKERS if marker in content]:
            raise ValueError(f"message {number} ({role}) contains {found[0]!r}, which marks turns; change it there")
        try:
            content.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair: JSON, but no text
            raise ValueError(f"message {number} ({role}): not valid Unicode: {error}") from error
        expected = (ASSISTANT,) if role == USER else (USER,)


def _opening(role: str) -> str:
    return f"<|{role}|>\n"


def tokenize(documents: Sequence[bytes], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`(tokens, counted)` of each conversation, int32 and bool [n]: the separator, then every piece; `counted` is
    True for the assistant's. `documents`: JSON lists of checked messages.

    Raises:
      ValueError: for token ids outside the vocabulary.
    """
    conversations = [conversation_text(json.loads(document)) for document in documents]
    flat = [text.encode() for pieces in conversations for text, _ in pieces]
    encoded = iter(encode_checked(tokenizer, flat))
    for pieces in conversations:
        parts = [np.array([tokenizer.document_id], np.int32), *(next(encoded) for _ in pieces)]
        counted = [np.full(part.size, flag) for part, flag in zip(parts, [False, *(f for _, f in pieces)], strict=True)]
        yield np.concatenate(parts), np.concatenate(counted)
