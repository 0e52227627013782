"""Program of tests/test_mesh.py, which runs it with several fake devices: trains tiny models on meshes, prints JSON.

For each mesh of each arm: the losses of a few steps, the collectives of the compiled step, the devices that its
permutations run between, and the largest shard of the training state as a fraction of the whole.
"""

import json
import re
import sys

import jax
import numpy as np

from iha_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from iha_jax.parallel.rules import state_shardings
from iha_jax.training.optimizer import make_optimizer
from iha_jax.training.step import initial_state, make_train_step
from tests.tiny import tiny

SIZES = dict(
    model__num_layers=4,
    model__context_length=24,
    model__vocab_size=264,
    model__mlp_width=32,
    model__num_heads=8,
    model__num_kv_heads=4,
)
ARMS = {
    "mha": dict(model__layer_pattern=("mha",)),
    "iha": dict(model__layer_pattern=("iha_local", "mha")),
    # Single layers: what each exchanges, beside what a training step exchanges with a chunked loss and accumulation.
    "mha_local": dict(model__layer_pattern=("mha_local",), model__num_layers=1, training__loss_chunk=8),
    "iha_local": dict(model__layer_pattern=("iha_local",), model__num_layers=1, training__accumulation=2),
    "iha_global": dict(model__layer_pattern=("iha",), model__num_layers=1),
}
PAIRS = re.compile(r" collective-permute(?:-start)?\(.*source_target_pairs=\{(.*?)\}\}")
COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


def batch():
    tokens = np.arange(8 * 25).reshape(8, 25) * 37 % 257
    segments = np.asarray([[1] * 7 + [2] * 15 + [0] * 2] * 8, np.int32)
    mask = (segments > 0).astype(np.float32)
    inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
    return {"inputs": inputs, "targets": targets, "segment_ids": segments, "loss_mask": mask}


def run(config, devices, steps=5):
    mesh = make_mesh(config.mesh, devices)
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: initial_state(config, optimizer))
        shardings = state_shardings(abstract, mesh)
        state = jax.jit(lambda: initial_state(config, optimizer), out_shardings=shardings)()
        rows = {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch().items()}
        step = jax.jit(make_train_step(config, optimizer), out_shardings=(shardings, replicated(mesh)))
        step = step.lower(state, rows).compile()
        losses = []
        for _ in range(steps):
            state, metrics = step(state, rows)
            losses.append(float(jax.block_until_ready(metrics["loss"])))
    held = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state))
    whole = sum(x.size for x in jax.tree.leaves(state))
    text = step.as_text()
    collectives = [[kind, result] for result, kind in COLLECTIVE.findall(text)]
    pairs = [[tuple(map(int, pair.split(","))) for pair in re.findall(r"\d+,\d+", p)] for p in PAIRS.findall(text)]
    return {"losses": losses, "collectives": collectives, "pairs": pairs, "held": float(held / whole)}


def main():
    found = {}
    for arm, meshes in json.loads(sys.argv[1]).items():
        for name, axes in meshes.items():
            settings = {f"mesh__{axis}": size for axis, size in axes.items()}
            config = tiny(training__batch_size=8, **(SIZES | ARMS[arm]), **settings)
            devices = jax.devices()[: int(np.prod(list(axes.values())))]
            found[f"{arm} {name}"] = run(config, devices)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
