"""Program of tests/test_context.py, which runs it with several fake devices: layers whose tokens are split, as JSON.

For each case: the largest relative error, over outputs and all gradients, of the layer on a mesh against the reference
implementation of the same layer on one device.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from iha_jax.parallel.mesh import AXES
from tests.test_attention_contract import D, error, make_layer

SEGMENTS = [[5] * 7 + [2] * 6 + [0] * 5, [1] * 3 + [2] * 4 + [3] * 11]


def largest_error(kind, *, segments, tensor=1, context=3, tokens=15, **settings):
    x, weights = (jax.random.normal(jax.random.key(seed), (2, tokens, D)) for seed in (0, 1))
    ids = jnp.asarray(SEGMENTS)[:, :tokens] if segments else None

    def run(implementation, mesh):
        apply, parameters = make_layer(kind, implementation=implementation, model__context_length=tokens, **settings)

        def loss(p, x):
            out = apply(p, x, ids)
            return jnp.sum(out * weights), out

        with jax.set_mesh(mesh):
            gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(parameters, x)
        return jax.tree.map(np.asarray, [out, *jax.tree.leaves(gradients)])

    def mesh(*shape):
        return Mesh(np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape), AXES)

    expected, got = run("reference", mesh(1, 1, 1, 1)), run("auto", mesh(1, 1, context, tensor))
    assert all(np.abs(x).max() > 0 for x in expected)
    return max(error(a, b) for a, b in zip(got, expected, strict=True))


if __name__ == "__main__":
    print(json.dumps({name: float(largest_error(**case)) for name, case in json.loads(sys.argv[1]).items()}))
