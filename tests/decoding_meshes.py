"""Program of tests/test_decoding.py, which runs it with several fake devices: continues texts on meshes, prints JSON.

Of each mesh: the tokens of all samples, how they ended, and the largest share of a cache that one device holds.
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from iha_jax.config import MeshConfig
from iha_jax.data.tokenizers import Bytes
from iha_jax.evaluation.decoding.generator import Generator
from iha_jax.evaluation.text_model import Sampling
from iha_jax.model import initialize
from iha_jax.parallel.mesh import make_mesh
from iha_jax.parallel.rules import state_shardings
from tests.test_model import KEY, perturbed
from tests.tiny import tiny

SIZES = dict(model__vocab_size=264, model__mlp_width=32, model__num_heads=4, model__num_kv_heads=2)
KINDS = ("iha_local", "mha", "iha", "mha_local")


def main():
    found = {}
    config = tiny(model__layer_pattern=KINDS, model__num_layers=4, model__context_length=64, **SIZES).model
    parameters = jax.jit(lambda key: perturbed(initialize(config, key), scale=0.1))(KEY)
    for name, axes in json.loads(sys.argv[1]).items():
        mesh = make_mesh(MeshConfig(**axes), jax.devices()[: int(np.prod(list(axes.values())))])
        placed = jax.device_put(parameters, state_shardings(parameters, mesh))
        model = Generator(config, placed, Bytes(), mesh=mesh, batch_size=4)
        completions = model.complete(["ab", "", "longer"], Sampling(max_tokens=9, temperature=1.0, samples=2))
        with jax.set_mesh(mesh):
            tokens, lengths = np.ones((4, 32), np.int32), np.full(4, 32, np.int32)
            caches = model._prefill(placed, tokens, lengths, length=64)[1]
        held = max(np.prod(x.sharding.shard_shape(x.shape)) / x.size for x in jax.tree.leaves(caches))
        found[name] = {"held": float(held), "completions": [dataclasses.asdict(c)["samples"] for c in completions]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
