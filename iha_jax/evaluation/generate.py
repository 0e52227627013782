"""Sampling a continuation from the full forward pass, one token at a time and without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from iha_jax.config import ModelConfig
from iha_jax.model import bind


@functools.partial(jax.jit, static_argnames=("config", "temperature"))
def _next_token(parameters, tokens_1N, length, key, *, config: ModelConfig, temperature: float):
    model = bind(config, parameters)
    # What stands after the prompt cannot be seen from its last token: attention is causal.
    hidden = jax.lax.dynamic_slice_in_dim(model.hidden(tokens_1N), length - 1, 1, axis=1)
    logits = model.logits(hidden)[0, 0]
    return jnp.argmax(logits) if temperature == 0 else jax.random.categorical(key, logits / temperature)


def sample(
    config: ModelConfig,
    parameters: dict,
    prompt: np.ndarray,
    *,
    new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    stop_token: int | None = None,
) -> np.ndarray:
    """Up to `new_tokens` token ids that follow `prompt` (int32 [n]); `temperature=0` takes the likeliest.

    The context is the last `context_length` tokens. Stops before `stop_token`. Each token costs a full forward pass.

    Raises:
      ValueError: for a bidirectional model, an empty prompt, a token outside the vocabulary, or a negative temperature.
    """
    if not config.causal:
        raise ValueError("config.model.causal = False: a bidirectional model has no next token; expected a causal one")
    prompt = np.asarray(prompt, np.int32)
    if prompt.size == 0:
        raise ValueError("prompt is empty: expected at least one token, such as the document separator")
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        raise ValueError(f"prompt has token {prompt.max()}; expected ids below vocab_size = {config.vocab_size}")
    if not temperature >= 0:
        raise ValueError(f"temperature = {temperature}: expected 0 or more")
    tokens, N = list(prompt), config.context_length
    key = jax.random.key(seed)
    for step in range(new_tokens):
        context = tokens[-N:]
        row = np.zeros((1, N), np.int32)
        row[0, : len(context)] = context
        step_key = jax.random.fold_in(key, step)
        token = int(_next_token(parameters, row, len(context), step_key, config=config, temperature=temperature))
        if token == stop_token:
            break
        tokens.append(token)
    return np.asarray(tokens[len(prompt) :], np.int32)
