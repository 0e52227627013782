"""Program of tests/test_processes.py: two processes place batches on meshes where rows lie apart or are shared."""

import sys

import jax
import numpy as np
from jax.sharding import Mesh

from iha_jax.parallel import mesh as meshes
from iha_jax.parallel.start import Place, connect

B, N = 8, 6


def check(mesh, expected_rows):
    whole = np.arange(B * N).reshape(B, N)
    rows = meshes.local_rows(mesh, B)
    assert rows == expected_rows[jax.process_index()], rows
    placed = meshes.place_batch({"x": whole[rows], "y": -whole[rows]}, mesh, B)
    assert placed["x"].shape == (B, N)
    for name, sign in (("x", 1), ("y", -1)):
        for shard in placed[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, sign * whole[shard.index])


if __name__ == "__main__":
    index, port = int(sys.argv[1]), sys.argv[2]
    connect(Place(f"127.0.0.1:{port}", 2, index), 60)
    a, b, c, d = jax.devices()  # two of each process
    assert [x.process_index for x in (a, b, c, d)] == [0, 0, 1, 1]

    def mesh(devices, *shape):
        return Mesh(np.array(devices).reshape(shape), meshes.AXES)

    check(mesh([a, b, c, d], 4, 1, 1, 1), [[0, 1, 2, 3], [4, 5, 6, 7]])
    check(mesh([c, a, d, b], 2, 2, 1, 1), [[2, 3, 6, 7], [0, 1, 4, 5]])  # a process's rows lie apart
    check(mesh([a, c, b, d], 1, 2, 1, 2), [list(range(8))] * 2)  # two processes hold the same rows
    check(mesh([a, c, d, b], 2, 1, 2, 1), [list(range(8))] * 2)  # other tokens of the same rows
    check(mesh([a, b, c, d], 2, 1, 2, 1), [[0, 1, 2, 3], [4, 5, 6, 7]])
    print("placed")
