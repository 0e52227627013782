"""What a task asks of a model: continue texts, and say how likely a continuation is.

Tasks know this interface alone, so a test can put a scripted model in the place of a trained one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from iha_jax.data.tokenizers import Tokenizer

STOP, DOCUMENT, LENGTH = "stop", "document", "length"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How continuations are drawn. A sample depends on seed, prompt number and sample number, not on batch size."""

    max_tokens: int = 256
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # the likeliest k tokens alone; 0: all
    top_p: float = 1.0  # the fewest likeliest tokens whose probabilities add up to top_p
    stop: tuple[str, ...] = ()  # a sample ends before the first of these strings
    samples: int = 1  # of each prompt
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One continuation. `ended`: by a stop string, by the document separator, or by `max_tokens` or the context."""

    text: str
    tokens: tuple[int, ...]
    ended: str


@dataclass(frozen=True)
class Completion:
    """The samples of one prompt, and how many of its tokens the model did not see: cut off on the left, after the
    document separator, which is cut off first and counts in `prompt_tokens` alone."""

    prompt_tokens: int
    dropped_tokens: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Score:
    """ln p(continuation | context) in nats, whether greedy decoding would give it, and context tokens not seen."""

    log_likelihood: float
    is_greedy: bool
    dropped_tokens: int


class TextModel(Protocol):
    """A model and its tokenizer. Every prompt and context is taken as the beginning of a document."""

    tokenizer: Tokenizer
    context_length: int

    def complete(self, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
        """Continuations of each prompt, in order. Raises ValueError for a prompt that is refused as too long."""
        ...

    def score(self, requests: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Score]:
        """Scores of (context, continuation) token ids, in order; the document separator before them is added."""
        ...
