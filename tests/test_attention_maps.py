"""Attention maps of whole models: with the values they give what the model's own layers give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iha_jax.evaluation.attention_maps import attention_maps
from iha_jax.model import bind, initialize
from iha_jax.model.by_layer import weights_by_layer
from tests.test_model import KEY, perturbed
from tests.tiny import tiny

SEGMENTS = jnp.asarray([[1] * 9 + [2] * 14, [3] * 17 + [0] * 6])
CASES = {
    "grouped": dict(layer_pattern=("mha", "iha_local"), num_layers=3, num_kv_heads=3, qk_norm=True),
    "token": dict(
        layer_pattern=("mha_local", "iha"),
        iha__causality="token",
        iha__rope_positions="token",
        iha__collapse="per_head",
    ),
    "fused": dict(layer_pattern=("iha_local", "fused_mixing"), iha__rope_positions="none"),
    "bidirectional": dict(layer_pattern=("iha",), positions="none", causal=False),
}


def model_blocks(config, parameters):
    """The model's own blocks, layer by layer, and its embedding table."""
    model = bind(config, parameters)
    groups = [jax.tree.map(lambda x, g=g: x[g], model.groups) for g in range(config.num_groups)]
    groups += [model.remainder] if hasattr(model, "remainder") else []
    return [block for group in groups for block in group.blocks()], model.embedding[...]


@jax.jit
def run(block, x, segment_ids):
    """The values, the attention's output and the activations after a block, as in training."""
    given = block.attention_norm(x)
    return block.attention.project(given)[2], block.attention(given, segment_ids, 1), block(x, segment_ids, 1)


@pytest.mark.parametrize("case", CASES)
def test_maps_times_values_projected_are_the_output_of_each_layer(case):
    changes = dict(num_layers=len(CASES[case]["layer_pattern"])) | CASES[case]
    config = tiny(**{f"model__{name}": value for name, value in changes.items()}).model
    segment_ids = SEGMENTS if case == "grouped" else None
    parameters = perturbed(initialize(config, KEY))
    weights = {name: np.asarray(x, np.float64) for name, x in weights_by_layer(parameters, config).items()}
    tokens = jax.random.randint(KEY, (2, 23), 0, config.vocab_size)
    real = np.ones((2, 23)) if segment_ids is None else np.asarray(segment_ids != 0)

    maps = attention_maps(config, parameters, tokens, segment_ids)
    assert [(found.layer, found.kind) for found in maps] == list(enumerate(config.layer_kinds))
    blocks, table = model_blocks(config, parameters)
    x = table[tokens]
    for found, block in zip(maps, blocks, strict=True):
        v, expected, x = run(block, x, segment_ids)
        start = f"layer_{found.layer}/attention/"
        own = {name.removeprefix(start): w for name, w in weights.items() if name.startswith(start)}
        pairs, reached, v = (np.asarray(y, np.float64) for y in (found.weights, found.value_weights, v))
        sums = np.broadcast_to(real[:, None, None], pairs.shape[:3] + real.shape[1:])
        np.testing.assert_allclose(pairs.sum((3, 5)), sums, atol=1e-5)

        if "alpha_value" in own:
            mixed = np.einsum("bmsd,shr->bmhrd", v, own["alpha_value"])
            pseudo = np.einsum("bhprnm,bmhrd->bnhpd", pairs, mixed)
            form = "ghp,bnhpd->bngd" if own["collapse"].ndim == 3 else "gp,bngpd->bngd"
            heads = np.einsum(form, own["collapse"], pseudo)
        else:
            heads = np.einsum("bhnm,bmhd->bnhd", pairs[:, :, 0, 0], np.repeat(v, 6 // v.shape[2], axis=2))
        for out in (heads, np.einsum("bgsnm,bmsd->bngd", reached, v)):
            np.testing.assert_allclose(np.einsum("bngd,gdD->bnD", out, own["output"]), expected, atol=2e-5)


def test_layers_without_one_softmax_a_head_are_refused_by_name():
    config = tiny(model__layer_pattern=("mha", "talking_heads", "differential"))
    with pytest.raises(ValueError, match=r"no attention maps of differential, talking_heads layers; expected .*iha"):
        attention_maps(config.model, {}, jnp.zeros((1, 23), jnp.int32))
