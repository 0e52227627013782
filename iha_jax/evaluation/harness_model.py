"""A `TextModel` as a model of lm-evaluation-harness, which this module needs (`pip install 'iha_jax[eval]'`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]

from iha_jax.evaluation.scoring import rolling_log_likelihoods
from iha_jax.evaluation.text_model import Sampling, TextModel

_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_UNDERSTOOD = ("until", *_MAX_TOKENS, "do_sample", "temperature", "top_k", "top_p")


class HarnessModel(TemplateLM):
    """Answers the harness's three kinds of request with `score` and `complete` of a `TextModel`.

    `dropped_tokens` and `cut_requests` count what contexts and prompts lost on their left for being too long. `adjust`
    changes how a task samples; with `chat`, prompts are turns of a conversation and answers end with theirs.
    """

    def __init__(self, model: TextModel, *, adjust: Callable[[Sampling], Sampling] | None = None, chat: bool = False):
        super().__init__()
        self.model = model
        self.dropped_tokens = self.cut_requests = 0
        self._adjust, self._chat = adjust or (lambda sampling: sampling), chat

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.document_id

    @property
    def max_length(self) -> int:
        return self.model.context_length

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.digest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.model.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any) -> list[Any]:
        """(ln p, is greedy) of each (texts, context, continuation)."""
        pairs = []
        for _, context, continuation in requests:
            # For an empty context the harness sends the separator, which `score` adds by itself.
            context = [] if context == [self.prefix_token_id] else context
            pairs.append((np.asarray(context, np.int32), np.asarray(continuation, np.int32)))
        scores = self.model.score(pairs)
        for score in scores:
            self._count(score.dropped_tokens)
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [self.model.tokenizer.encode(request.args[0]) for request in requests]
        return rolling_log_likelihoods(self.model, texts)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Requests that sample alike run together. Raises ValueError for an argument that is not understood."""
        groups: dict[Sampling, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._adjust(sampling(request.args[1], chat=self._chat)), []).append(i)
        texts = [""] * len(requests)
        for how, places in groups.items():
            completions = self.model.complete([requests[i].args[0] for i in places], how)
            for i, completion in zip(places, completions, strict=True):
                texts[i] = completion.samples[0].text
                self._count(completion.dropped_tokens)
        return texts

    def _count(self, dropped: int) -> None:
        self.dropped_tokens += dropped
        self.cut_requests += dropped > 0

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        from iha_jax.data.chat import MARKERS

        return " ".join(MARKERS) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation so far as the model was fine-tuned on it; a last message of the assistant is begun."""
        from iha_jax.data.chat import prompt_text

        if chat_history and chat_history[-1]["role"] == "assistant":
            return prompt_text(chat_history[:-1]) + chat_history[-1]["content"]
        return prompt_text(chat_history)


def sampling(arguments: Mapping[str, Any], *, chat: bool = False) -> Sampling:
    """`generation_kwargs` of a task. Greedy unless `do_sample` is true, or absent and `temperature` above 0.

    Raises:
      ValueError: for an argument that is not understood, or a value of the wrong kind.
    """
    arguments = {name: value for name, value in arguments.items() if (name, value) != ("num_beams", 1)}  # no search
    unknown = [name for name in arguments if name not in _UNDERSTOOD]
    if unknown:
        raise ValueError(f"generation_kwargs: {', '.join(unknown)} not understood; expected {', '.join(_UNDERSTOOD)}")
    until = arguments.get("until") or []
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    if chat:
        from iha_jax.data.chat import END_OF_TURN

        stop = (*stop, END_OF_TURN)
    limits = [arguments[name] for name in _MAX_TOKENS if arguments.get(name) is not None]
    try:
        temperature = float(arguments.get("temperature") or 0)
        do_sample = arguments.get("do_sample")
        if do_sample and not arguments.get("temperature"):  # sampling without a temperature is sampling at 1
            temperature = 1.0 if arguments.get("temperature") is None else 0.0
        return Sampling(
            max_tokens=int(limits[0]) if limits else Sampling.max_tokens,
            temperature=0.0 if do_sample is False else temperature,
            top_k=int(arguments.get("top_k") or 0),
            top_p=float(1 if arguments.get("top_p") is None else arguments["top_p"]),
            stop=stop,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"generation_kwargs = {dict(arguments)}: {error}") from error
