"""The transformer: causality, segments, initialization, scan and remat, precision, loss and gradient accumulation."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import paper_2p4b
from iha_jax.config import resolve
from iha_jax.model import abstract_parameters, bind, initialize
from iha_jax.model.warm_start import warm_start
from iha_jax.training.step import initial_state, make_train_step
from tests.tiny import tiny

KEY = jax.random.key(7)


def random_tokens(config, batch=2, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, config.model.context_length), 0, config.model.vocab_size)


def perturbed(parameters, scale=0.1, seed=1):
    """Parameters away from their special initial values, so that no weight hides behind a zero or an identity."""
    leaves, tree = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def logits(config, parameters, tokens, segment_ids=None):
    return jax.jit(lambda p: bind(config.model, p)(tokens, segment_ids))(parameters)


def test_position_n_depends_on_every_earlier_token_and_no_later_one():
    config = tiny()
    parameters = perturbed(initialize(config.model, KEY))
    model, n = bind(config.model, parameters), 11
    tokens = random_tokens(config, batch=1)

    def apply(x, group):
        for block in group.blocks():
            x = block(x, None, 1)
        return x, None

    def output(embeddings_BND):
        x, _ = jax.lax.scan(apply, embeddings_BND, model.groups)
        return jnp.sum(jnp.sin(model.logits(model.final_norm(x))[0, n]))

    gradient = jax.jit(jax.grad(output))(model.embedding[...][tokens])[0]
    reached = np.abs(gradient).max(axis=-1) > 0
    assert not reached[n + 1 :].any()
    assert reached[: n + 1].all()


def test_documents_of_a_row_do_not_see_each_other():
    config = tiny()
    parameters = perturbed(initialize(config.model, KEY))
    tokens = random_tokens(config)
    segments = jnp.asarray([[1] * 9 + [2] * 10 + [0] * 4] * 2)
    whole = logits(config, parameters, tokens, segments)
    other = tokens.at[:, :9].set(3).at[:, 19:].set(5)
    changed = logits(config, parameters, other, segments)
    np.testing.assert_array_equal(whole[:, 9:19], changed[:, 9:19])
    assert np.isfinite(whole).all()
    assert np.abs(logits(config, parameters, tokens) - whole)[:, 9:19].max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        dict(model__qk_norm=True, model__num_kv_heads=2),
        dict(model__mlp="swiglu", model__tie_embeddings=False),
        dict(model__iha__collapse="per_head", model__iha__causality="token", model__iha__rope_positions="none"),
    ],
    ids=["qk-norm, grouped heads", "swiglu, untied", "per-head collapse"],
)
def test_options_give_every_parameter_a_gradient(changes):
    config = tiny(**changes)
    parameters = perturbed(initialize(config.model, KEY))
    tokens = random_tokens(config)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(bind(config.model, p)(tokens)))))(parameters)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_scan_equals_loop_and_remat_equals_none():
    config = tiny(model__layer_pattern=("iha_local", "mha"), model__num_layers=5)
    parameters = perturbed(initialize(config.model, KEY), scale=0.02)
    tokens = random_tokens(config)

    def value_and_grad(**changes):
        model_config = dataclasses.replace(config.model, **changes)
        return jax.jit(jax.value_and_grad(lambda p: jnp.mean(jnp.square(bind(model_config, p)(tokens)))))(parameters)

    expected = value_and_grad()
    for changes in (dict(scan_layers=False), dict(remat="full"), dict(remat="dots")):
        value, gradient = value_and_grad(**changes)
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)
        error = optax.global_norm(jax.tree.map(jnp.subtract, gradient, expected[1])) / optax.global_norm(expected[1])
        assert error < 1e-5, changes


@pytest.mark.parametrize("kind", ["mha", "iha_local", "iha"])
def test_remat_dots_keeps_products_with_weights_and_nothing_of_attention(kind):
    """What a vjp holds beside what it holds under "full": 4 D + F numbers a token and layer, no scores."""
    model = tiny(model__layer_pattern=(kind,), model__num_layers=4).model
    parameters, tokens = abstract_parameters(model), jax.ShapeDtypeStruct((3, model.context_length), jnp.int32)

    def kept(remat):
        bound = dataclasses.replace(model, remat=remat)
        held = jax.eval_shape(lambda p, tokens: jax.vjp(lambda p: bind(bound, p)(tokens), p)[1], parameters, tokens)
        return sum(leaf.size for leaf in jax.tree.leaves(held))

    more = model.num_layers * tokens.size * (4 * model.width + model.mlp_width)
    assert kept("dots") - kept("full") == more
    assert kept("none") - kept("full") > 2 * more


def test_bfloat16_compute_keeps_float32_parameters_logits_and_gradients():
    config = tiny()
    half = tiny(model__compute_dtype="bfloat16")
    parameters = perturbed(initialize(config.model, KEY), scale=0.02)
    tokens = random_tokens(config)
    exact, rough = logits(config, parameters, tokens), logits(half, parameters, tokens)
    assert rough.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact) < 0.03
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(bind(half.model, p)(tokens) ** 2)))(parameters)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}


def layers(parameters, config):
    from iha_jax.model.by_layer import weights_by_layer

    return weights_by_layer(parameters, config)


def test_arms_start_from_the_same_weights_where_shapes_agree():
    iha, mha = tiny(), tiny(model__layer_pattern=("mha",))
    ours, theirs = layers(initialize(iha.model, KEY), iha.model), layers(initialize(mha.model, KEY), mha.model)
    assert set(theirs) < set(ours)
    for name, value in theirs.items():
        np.testing.assert_array_equal(value, ours[name], err_msg=name)
    assert not np.array_equal(theirs["layer_0/attention/query"], theirs["layer_1/attention/query"])
    assert not np.array_equal(theirs["layer_0/attention/query"], theirs["layer_0/attention/key"])
    assert np.std(theirs["layer_0/attention/query"]) == pytest.approx(24**-0.5, rel=0.15)
    assert np.std(theirs["layer_0/mlp/down"]) == pytest.approx((29 * 10) ** -0.5, rel=0.15)


@pytest.mark.parametrize("mixing", ["identity", "shifted", "first", "random"])
@pytest.mark.parametrize("collapse", ["mean", "last", "first", "random"])
def test_initial_mixing_follows_its_table(mixing, collapse):
    config = tiny(model__iha__mixing_init=mixing, model__iha__collapse_init=collapse, model__num_kv_heads=2)
    attention = initialize(config.model, KEY)["groups"]["block_0"]["attention"]
    alpha, key, collapse_value = (np.asarray(attention[n][0]) for n in ("alpha_query", "alpha_key", "collapse"))
    assert alpha.shape == (6, 6, 3)
    assert key.shape == (2, 6, 3)
    for h in range(6):
        for p in range(3):
            start = (h + p) % 6 if mixing == "shifted" else h
            there = 0.0 if mixing == "first" and p > 0 else 1.0
            if mixing != "random":
                np.testing.assert_array_equal(alpha[:, h, p], there * np.eye(6)[start])
                np.testing.assert_array_equal(key[:, h, p], there * np.eye(2)[start // 3])
            if collapse != "random":
                weight = {"mean": 1 / 3, "last": float(p == 2), "first": float(p == 0)}[collapse]
                np.testing.assert_allclose(collapse_value[:, h, p], weight * np.eye(6)[h])
    if mixing == "random":
        assert 0.2 < np.std(alpha) * 6**0.5 < 1.8


@pytest.mark.parametrize(
    ("arm", "count", "global_layers"),
    [
        ("iha", 2_373_866_240, 5),
        ("global", 2_373_194_240, 26),
        ("global_local", 2_373_194_240, 5),
        ("talking_heads", 2_373_215_040, 0),
        ("differential", 2_373_214_208, 0),
        ("simplicial", 2_451_837_440, 20),
        ("fused_mixing", 2_373_225_440, 0),
    ],
)
def test_paper_model_has_the_stated_parameter_count_and_builds_abstractly(arm, count, global_layers):
    config = resolve(paper_2p4b.get_config(arm))
    parameters = abstract_parameters(config.model)
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == count
    assert f"{count:,}".replace(",", " ") in paper_2p4b.__doc__
    assert config.model.layer_kinds.count("mha") == global_layers
    assert config.model.iha.window == 10
    tokens = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    hidden = jax.eval_shape(lambda p, x, ids: bind(config.model, p).hidden(x, ids), parameters, tokens, tokens)
    assert (hidden.shape, hidden.dtype) == ((1, 8192, 2560), jnp.bfloat16)


EXACT = {
    "token causality, token RoPE": (dict(causality="token", rope_positions="token"), "mean", True),
    "token causality, last": (dict(causality="token", rope_positions="token"), "last", True),
    "virtual causality, token RoPE, last": (dict(causality="virtual", rope_positions="token"), "last", True),
    "virtual causality, mean": (dict(causality="virtual", rope_positions="token"), "mean", False),
    "virtual RoPE": (dict(causality="token", rope_positions="virtual"), "last", False),
}


@pytest.mark.parametrize("name", EXACT)
def test_starting_iha_from_a_trained_mha(name):
    switches, collapse, exact = EXACT[name]
    mha = tiny(model__layer_pattern=("mha",))
    iha = tiny(model__layer_pattern=("iha", "mha"), model__iha__collapse_init=collapse)
    iha = dataclasses.replace(
        iha, model=dataclasses.replace(iha.model, iha=dataclasses.replace(iha.model.iha, **switches))
    )
    trained = perturbed(initialize(mha.model, KEY), scale=0.05)
    started = warm_start(initialize(iha.model, jax.random.key(1)), iha.model, trained, mha.model)
    tokens = random_tokens(mha)
    expected, got = logits(mha, trained, tokens), logits(iha, started, tokens)
    error = jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)
    assert error < 2e-6 if exact else error > 1e-3


def test_warm_start_refuses_what_does_not_fit():
    mha, wider = tiny(model__layer_pattern=("mha",)), tiny(model__mlp_width=31, model__num_layers=6)
    with pytest.raises(ValueError, match=r"(?s)layer_0/mlp/up: \(24, 29\) in the source.*layer_5/mlp/up: not in"):
        warm_start(initialize(wider.model, KEY), wider.model, initialize(mha.model, KEY), mha.model)


def batch_for(config):
    tokens = np.asarray(jax.random.randint(jax.random.key(5), (4, config.model.context_length + 1), 0, 257))
    mask = np.ones((4, config.model.context_length), np.float32)
    mask[0, 5:] = 0  # micro-batches with unequal token counts
    mask[3, :3] = 0
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((4, config.model.context_length), np.int32),
        "loss_mask": mask,
    }


def gradient_step(**changes):
    config = tiny(training__z_loss=1e-3, **changes)
    optimizer = optax.sgd(1.0)
    state, metrics = jax.jit(make_train_step(config, optimizer))(initial_state(config, optimizer), batch_for(config))
    return state["parameters"], metrics


def test_accumulation_and_chunked_loss_give_the_whole_batch_gradient():
    expected, metrics = gradient_step()
    for changes in (dict(training__accumulation=2), dict(training__loss_chunk=1)):
        got, got_metrics = gradient_step(**changes)
        for name in metrics:
            np.testing.assert_allclose(got_metrics[name], metrics[name], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)


def test_core_imports_without_data_and_checkpoint_libraries():
    blocked = ("ml_collections", "grain", "tensorflow_datasets", "matplotlib", "jaxtyping", "tqdm", "array_record")
    program = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
import iha_jax.ops, iha_jax.model
"""
    subprocess.run([sys.executable, "-c", program], check=True)
