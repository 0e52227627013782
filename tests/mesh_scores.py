"""Program of tests/test_scoring.py, which runs it with four fake devices: scores on meshes, as JSON."""

import json
import sys

import jax
import numpy as np

from iha_jax.config import MeshConfig
from iha_jax.evaluation import scoring
from iha_jax.evaluation.scoring import Scorer
from iha_jax.model import initialize
from iha_jax.parallel.mesh import make_mesh
from iha_jax.parallel.rules import state_shardings
from tests.tiny import tiny

SIZES = dict(context_length=24, vocab_size=264, mlp_width=32, num_heads=4, num_kv_heads=4, num_layers=2)


def main(meshes):
    scoring._SHORTEST, scoring._CHUNK = 4, 4  # several lengths, several chunks
    changes = {f"model__{name}": value for name, value in SIZES.items()}
    config = tiny(**changes, model__layer_pattern=("iha_local", "mha"), model__compute_dtype="float32").model
    rng = np.random.default_rng(0)
    sizes = [(5, 3), (0, 4), (31, 7), (2, 1), (12, 2)]
    requests = [(rng.integers(0, 256, a), rng.integers(0, 256, b)) for a, b in sizes]
    parameters = jax.tree.map(np.asarray, initialize(config, jax.random.key(1)))
    found = {}
    for name, axes in meshes.items():
        mesh = make_mesh(MeshConfig(**axes), jax.devices()[: int(np.prod(list(axes.values())))])
        placed = jax.device_put(parameters, state_shardings(parameters, mesh))
        scores = Scorer(config, placed, 256, mesh, batch_size=4).score(requests)
        found[name] = [score.log_likelihood for score in scores]
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
