"""Cached decoding: every step gives the logits of the full forward pass, whatever the mechanism and its switches."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from iha_jax.accounting import cache_bytes
from iha_jax.data.tokenizers import Bytes
from iha_jax.evaluation.decoding.drawing import Drawing, candidates, draw, keys
from iha_jax.evaluation.decoding.generator import Generator, _Row
from iha_jax.evaluation.decoding.mechanisms import DECODING
from iha_jax.evaluation.decoding.transformer import Decoder, prefill
from iha_jax.evaluation.text_model import DOCUMENT, LENGTH, STOP, Sampling
from iha_jax.model import ATTENTION, bind, initialize
from tests.several import printed_by
from tests.test_model import KEY, perturbed
from tests.tiny import tiny

KINDS = sorted(ATTENTION)
ELSEWHERE = ("mha", "fused_mixing", "simplicial")  # less of what is tested by default already
LENGTHS = np.asarray([1, 7, 13])  # of prompts: shorter than, as long as and longer than the rings


def small(kinds, **changes):
    settings = dict(model__vocab_size=31, model__layer_pattern=kinds, model__num_layers=2, model__context_length=17)
    return tiny(**{**settings, "model__num_heads": 4, "model__head_width": 6, **changes}).model


def decoded(config, parameters, tokens, length):
    """Float32 logits [B, N, V] by one prefill of `LENGTHS` tokens and steps to N, NaN before; and the cache."""
    decoder_step = jax.jit(lambda *arguments: Decoder(config, parameters).step(*arguments))
    padded = np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], tokens[:, : LENGTHS.max()], 5)
    run = jax.jit(functools.partial(prefill, config, length=length))
    logits, caches = run(parameters, padded, LENGTHS)
    out = np.full((*tokens.shape, config.vocab_size), np.nan, np.float32)
    rows = np.arange(len(tokens))
    out[rows, LENGTHS - 1] = logits
    positions = LENGTHS.copy()
    while (positions < length).any():
        here = np.minimum(positions, length - 1)  # a row at its end writes its last token again
        logits, caches = decoder_step(caches, tokens[rows, here], here)
        out[rows, here] = logits
        positions += 1
    return out, caches


def check(config, length=None, tolerance=1e-5):
    length = length or config.context_length
    parameters = jax.jit(lambda key: perturbed(initialize(config, key), scale=0.1))(KEY)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (len(LENGTHS), length))
    expected = np.asarray(jax.jit(lambda p: bind(config, p)(tokens))(parameters))
    got, caches = decoded(config, parameters, tokens, length)
    there = np.arange(length) >= LENGTHS[:, None] - 1
    assert np.isfinite(got[there]).all()
    off = np.linalg.norm(got[there] - expected[there], axis=-1) / np.linalg.norm(expected[there], axis=-1)
    assert off.max() < tolerance
    assert sum(x.nbytes for x in jax.tree.leaves(caches)) == cache_bytes(config, len(LENGTHS), length)


def test_every_mechanism_can_decode():
    assert set(DECODING) == set(ATTENTION)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k in ELSEWHERE else ()) for k in KINDS])
def test_steps_equal_the_full_forward_pass(kind):
    """Two scanned layers, K < H, rings that come round, rows of different lengths."""
    check(small((kind,), model__num_kv_heads=2))


IHA_SWITCHES = (
    dict(model__iha__causality="token", model__iha__collapse="per_head", model__qk_norm=True),
    dict(model__iha__rope_positions="token", model__scan_layers=False),
    pytest.param(dict(model__positions="none", model__iha__collapse="per_head"), marks=pytest.mark.slow),
    pytest.param(dict(model__iha__pseudo_heads=1, model__iha__window=1), marks=pytest.mark.slow),
)


@pytest.mark.parametrize("switches", IHA_SWITCHES, ids=lambda switches: "-".join(map(str, switches.values())))
def test_every_switch_of_iha(switches):
    """A local and a global layer, and a local one left over."""
    check(small(("iha_local", "iha"), **{"model__num_layers": 3, **switches}))


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_switch_of_every_mechanism(kind, positions, qk_norm, scan):
    """Three layers, one left over; K = H with QK-norm, else K < H."""
    K = 4 if qk_norm else 2
    switches = dict(model__positions=positions, model__qk_norm=qk_norm, model__scan_layers=scan, model__num_kv_heads=K)
    check(small((kind, "mha"), model__num_layers=3, **switches))


@pytest.mark.slow
@pytest.mark.parametrize("collapse", ["global", "per_head"])
@pytest.mark.parametrize("rope_positions", ["virtual", "token", "none"])
@pytest.mark.parametrize("causality", ["virtual", "token"])
def test_every_combination_of_ihas_switches(causality, rope_positions, collapse):
    iha = dict(causality=causality, rope_positions=rope_positions, collapse=collapse)
    check(small(("iha", "iha_local"), **{f"model__iha__{name}": value for name, value in iha.items()}))


def test_caches_of_fewer_slots_than_the_context():
    """Of the length asked for, and rings that are no longer than that."""
    check(small(("mha_local", "iha_local"), model__window=15, model__iha__window=14), length=13)


@pytest.mark.slow
def test_half_precision_stays_near():
    check(small(("iha_local", "mha"), model__compute_dtype="bfloat16"), tolerance=0.05)


def drawable(probabilities, **settings):
    """Ids that can be drawn and their probabilities, by id."""
    drawing = Drawing.of(Sampling(**{"temperature": 1.0, **settings}), 9)
    values, ids = candidates(np.log(np.asarray([probabilities], np.float32)), drawing)
    weights = np.exp(values[0]) / np.exp(values[0]).sum()
    return {int(i): round(float(w), 4) for i, w in zip(ids[0], weights, strict=True) if w > 0}


def test_candidates_by_hand():
    p = [0.1, 0.4, 0.15, 0.3, 0.05]
    assert drawable(p, top_k=2) == {1: 0.5714, 3: 0.4286}
    assert drawable(p, top_p=0.7) == {1: 0.5714, 3: 0.4286}  # 0.4 + 0.3 reach it
    assert drawable(p, top_p=0.71) == {1: 0.4706, 3: 0.3529, 2: 0.1765}
    assert drawable(p, top_p=1e-6) == {1: 1.0}
    assert drawable(p, top_k=3, top_p=0.8) == {1: 0.5714, 3: 0.4286}  # of what top-k left, 0.47 + 0.35 reach it
    assert drawable(p, top_k=3, top_p=0.83) == {1: 0.4706, 3: 0.3529, 2: 0.1765}
    assert drawable([0.2, 0.8], temperature=0.5) == {1: 0.9412, 0: 0.0588}  # squares
    assert drawable([0.2, 0.8], temperature=0.5, top_p=0.9) == {1: 1.0}  # temperature comes first
    assert drawable([0.25] * 4, top_k=2) == {0: 0.5, 1: 0.5}  # of equals, the lower ids


def test_draws_follow_their_distribution_and_keys():
    number = np.arange(4000)
    logits = np.log(np.tile(np.asarray([0.5, 0.3, 0.2], np.float32), (4000, 1)))
    for settings, expected in (
        (dict(), (0.5, 0.3, 0.2)),
        (dict(top_k=2), (0.625, 0.375, 0)),
        (dict(temperature=0.0), (1, 0, 0)),
    ):
        drawing = Drawing.of(Sampling(**{"temperature": 1.0, **settings}), 9)
        tokens = draw(logits, keys(np.uint32(3), number, 0 * number, 0 * number), drawing)
        assert np.allclose(np.bincount(tokens, minlength=3) / 4000, expected, atol=0.03)
    for settings in (dict(), dict(top_k=2), dict(top_p=0.9), dict(temperature=0.0)):  # a padded vocabulary
        drawing = Drawing.of(Sampling(**{"temperature": 1.0, **settings}), 2)
        padded = draw(logits[:99, ::-1], keys(np.uint32(3), number[:99], number[:99], number[:99]), drawing)
        assert set(np.asarray(padded).tolist()) <= {0, 1}
    each = np.eye(5, 4, dtype=int)  # seed, prompt, sample, token: one of them 1, or none
    of = [jax.random.key_data(keys(np.uint32(s), *(np.asarray([x]) for x in rest))) for s, *rest in each]
    assert len({tuple(np.ravel(key)) for key in of}) == 5


@pytest.mark.parametrize(("field", "value"), [("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5)])
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value}"):
        Drawing.of(Sampling(**{field: value}), 9)


def grown(pieces, stop=(), limit=99, anchor=()):
    row = _Row(0, 0, anchor, limit)
    for piece in pieces:
        if row.ended is None:
            row.extend(piece, stop, Bytes())
    return row.text, len(row.tokens), row.ended


def test_samples_end_where_they_should():
    text = list(b"one two three")
    assert grown([text], stop=["two"]) == ("one ", 7, STOP)
    assert grown([text[:5], text[5:6], text[6:]], stop=["two"]) == ("one ", 7, STOP)  # across tokens and calls
    assert grown([text], stop=["ee", "wo t"]) == ("one t", 9, STOP)  # the one that is whole first
    assert grown([text[:6]], stop=["two"]) == ("one tw", 6, None)
    assert grown([text[:3], [256, 65]], stop=["A"]) == ("one", 3, DOCUMENT)
    assert grown([text], limit=7) == ("one two", 7, LENGTH)
    assert grown([text], limit=7, stop=["two"]) == ("one ", 7, STOP)
    assert grown([[0xC3], [0xA9, 65]], anchor=tuple(b"caf")) == ("\u00e9A", 3, None)  # one character of two tokens


def test_a_first_space_is_kept():
    """Tokenizers that drop a text's first space do so in the prompt's last tokens, not in the sample."""

    class Words(Bytes):
        def decode(self, ids):
            return super().decode(ids).removeprefix(" ")

    row = _Row(0, 0, tuple(b"2 + 2 ="), 9)
    row.extend(list(b" 4"), (), Words())
    assert row.text == " 4"


@functools.cache
def generator(**settings):
    model = tiny(model__num_layers=3, model__num_kv_heads=2, model__context_length=53).model
    parameters = jax.jit(lambda key: perturbed(initialize(model, key), scale=0.1))(KEY)
    return Generator(model, parameters, Bytes(), **settings)


PROMPTS = ["a", "", "some longer words", "bc"]


def test_greedy_samples_are_those_of_the_full_forward_pass():
    model = generator(batch_size=3)
    forward = jax.jit(lambda tokens: bind(model.config, model.parameters)(tokens))
    for prompt, completion in zip(PROMPTS, model.complete(PROMPTS, Sampling(max_tokens=20)), strict=True):
        tokens, drawn = [256, *prompt.encode()], completion.samples[0].tokens
        assert (completion.prompt_tokens, completion.dropped_tokens) == (len(tokens), 0)
        padded = np.zeros((1, 53), np.int32)
        padded[0, : len(tokens) + len(drawn)] = [*tokens, *drawn]
        likeliest = np.asarray(forward(padded))[0].argmax(-1)[len(tokens) - 1 :][: len(drawn)]
        assert drawn == tuple(likeliest)
        assert len(drawn) == 20 or completion.samples[0].ended == DOCUMENT


def test_a_sample_depends_on_nothing_else_in_the_batch():
    sampling = Sampling(max_tokens=20, temperature=1.0, samples=3, seed=5)
    alone = generator(batch_size=1).complete(PROMPTS, sampling)
    assert alone == generator(batch_size=7).complete(PROMPTS, sampling)
    assert alone[:2] == generator(batch_size=7).complete(PROMPTS[:2], sampling)
    texts = [sample.tokens for completion in alone for sample in completion.samples]
    assert len(set(texts)) == len(texts)
    assert (
        alone[0] != generator(batch_size=7).complete(PROMPTS[:1], Sampling(max_tokens=20, temperature=1.0, seed=6))[0]
    )


def test_prompts_that_are_too_long():
    long = "x" * 60
    (cut,) = generator(batch_size=3).complete([long], Sampling(max_tokens=20))
    assert (cut.prompt_tokens, cut.dropped_tokens) == (61, 60 - 33)
    (half,) = generator(batch_size=3).complete([long], Sampling(max_tokens=500))  # ends with the context
    assert (half.dropped_tokens, len(half.samples[0].tokens)) == (60 - 26, 27)
    assert half.samples[0].ended == LENGTH
    refusing = generator(batch_size=3, too_long="refuse")
    with pytest.raises(
        ValueError, match=r"prompt 1 has 60 tokens; of a context of 53 at most 33 are .* where 20 new ones may follow"
    ):
        refusing.complete(["short", long], Sampling(max_tokens=20))
    (whole,) = refusing.complete(["x" * 33], Sampling(max_tokens=20))  # the separator alone is cut off
    assert (whole.prompt_tokens, whole.dropped_tokens) == (34, 0)


def test_what_cannot_be_decoded_is_refused():
    config = generator(batch_size=3).config
    for changes, message in (
        (dict(causal=False), "bidirectional"),
        (dict(vocab_size=200), "257 tokens; the model has 200"),
    ):
        with pytest.raises(ValueError, match=message):
            Generator(dataclasses.replace(config, **changes), {}, Bytes())
    for sampling in (Sampling(max_tokens=0), Sampling(samples=0), Sampling(seed=-1), Sampling(stop=("",))):
        with pytest.raises(ValueError, match=r"max_tokens = 0|samples = 0|seed = -1|stop = "):
            generator(batch_size=3).complete(["a"], sampling)


@pytest.mark.slow
def test_meshes_give_the_same_samples_and_split_the_caches():
    one = dict(data=1, fsdp=1, context=1, tensor=1)
    meshes = {"one": one, "fsdp 2 x tensor 2": one | dict(fsdp=2, tensor=2), "context 2": one | dict(context=2)}
    found = printed_by("tests.decoding_meshes", meshes, devices=4)
    assert {name: each["held"] for name, each in found.items()} == {"one": 1, "fsdp 2 x tensor 2": 0.25, "context 2": 1}
    for name in meshes:
        assert found[name]["completions"] == found["one"]["completions"], name


def test_steps_write_caches_in_place():
    """The compiled steps hold less than one layer's cache beside the caches they were given, which they give back."""
    model = generator(batch_size=3)
    config = dataclasses.replace(model.config, context_length=4096)

    def steps(parameters, caches, tokens, positions):
        decoder = Decoder(config, parameters)
        body = lambda i, carry: (decoder.step(carry[0], carry[1], positions + i)[1], carry[1])  # noqa: E731
        return jax.lax.fori_loop(0, 3, body, (caches, tokens))[0]

    rows = np.ones(3, np.int32)
    caches = jax.eval_shape(
        functools.partial(prefill, config, length=4096), model.parameters, np.ones((3, 1), np.int32), rows
    )[1]
    memory = jax.jit(steps, donate_argnums=1).lower(model.parameters, caches, rows, rows).compile().memory_analysis()
    held = sum(x.size * 4 for x in jax.tree.leaves(caches))
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < caches[-1]["key"].size * 4 / 2
