"""Checkpoints under attack: altered, cut off, swapped, missing and hostile files; kills and failures while saving."""

import json
import os
import random
import resource
import shutil
import signal
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iha_jax.parallel.mesh import make_mesh
from iha_jax.training.checkpoint import (
    CheckpointCorrupt,
    Checkpointer,
    CheckpointMismatch,
    SaveFailed,
    StateNotFinite,
    _digest,
)
from iha_jax.training.fingerprint import fingerprint, inspect
from iha_jax.training.manifest import damage, write_manifest
from iha_jax.training.optimizer import make_optimizer
from iha_jax.training.run_directory import load_run_config
from iha_jax.training.saves import Saves
from iha_jax.training.state import abstract_state


def state(seed=0):
    """One array is too large to stand in the nodes of the store's index, which have checksums of their own."""
    keys = jax.random.split(jax.random.key(seed), 3)
    parameters = {"a": jax.random.normal(keys[0], (13, 7)), "b": jax.random.normal(keys[1], (5,), jnp.bfloat16)}
    return {"parameters": parameters, "optimizer": (jax.random.normal(keys[2], (59, 31)),), "step": jnp.int32(seed)}


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpointer(directory, writable=True) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), metadata={"tokens": 7.0 * step})
            assert checkpoints.confirm() == step
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_every_changed_bit_and_every_swap_changes_the_fingerprint():
    def of(x):
        return inspect({"x": jnp.asarray(x)})[0]["x"]

    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.int32, np.uint8, jnp.bfloat16, np.float16):
        x = rng.integers(0, 100, (3, 5, 7)).astype(dtype)
        expected, word = of(x), np.dtype(f"u{np.dtype(dtype).itemsize}")
        for bit in range(8 * word.itemsize):
            flipped = x.copy()
            flipped.view(word).reshape(-1)[rng.integers(x.size)] ^= word.type(1 << bit)
            assert of(flipped) != expected, (dtype, bit)
    x = rng.normal(size=(8, 4)).astype(np.float32)
    x[1] = -x[0]  # differs in the highest bit alone, which sums with odd factors would not see exchanged
    swapped = x.copy()
    swapped[[0, 1]] = x[[1, 0]]
    assert of(swapped) != of(x)
    assert of(x) != of(np.roll(x, 1))


def test_the_fingerprint_does_not_depend_on_the_sharding():
    devices = jax.devices()
    x = jax.random.normal(jax.random.key(0), (len(devices) * 3, 5))
    mesh = Mesh(np.asarray(devices), ("fsdp",))
    for spec in (PartitionSpec("fsdp"), PartitionSpec()):
        assert inspect({"x": jax.device_put(x, NamedSharding(mesh, spec))})[0] == inspect({"x": x})[0]


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 11), (8, 16)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_])
def test_the_fingerprint_in_pieces_is_the_fingerprint(shape, dtype):
    """Saved on one device, in pieces, and restored on many, at once: the numbers must agree."""
    x = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    assert int(fingerprint(x, in_pieces=True)) == int(fingerprint(x))


def test_what_was_saved_is_what_is_restored(saved):
    with Checkpointer(saved, writable=False) as checkpoints:
        assert same(checkpoints.restore(like(state()), 2), state(2))
        assert same(checkpoints.restore_parameters(like(state()["parameters"]), 1), state(1)["parameters"])
        checkpoints.verify(like(state()), 2)
        assert checkpoints.metadata(2) == {"tokens": 14.0}


def corrupt(path, rng, pattern):
    """One random corruption of the files of a checkpoint that fit the pattern; says which."""
    files = sorted(p for p in path.rglob(pattern) if p.is_file() and p.stat().st_size)
    file = rng.choice(files)
    kind = rng.choice(["flip", "flip", "flip", "truncate", "zeros", "delete", "swap"])
    content = bytearray(file.read_bytes())
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        content = content[: rng.randrange(len(content))]
    elif kind == "zeros":
        start = rng.randrange(len(content))
        content[start : start + 64] = bytes(len(content[start : start + 64]))
    elif kind == "swap":
        other = rng.choice([f for f in files if f != file])
        other_content = other.read_bytes()
        other.write_bytes(bytes(content))
        content = other_content
    changed = bytes(content) != file.read_bytes() or kind == "delete"
    file.unlink() if kind == "delete" else file.write_bytes(bytes(content))
    return f"{kind} {file.relative_to(path)}", changed


@pytest.mark.parametrize("with_manifest", [True, False], ids=["manifest", "fingerprints alone"])
def test_no_corruption_is_silent(saved, tmp_path, with_manifest, monkeypatch):
    """A hundred random ones. Without checksums, in the files of arrays, the fingerprints find what matters:
    either the state is refused, or it is bit for bit what was saved (unused bytes were hit)."""
    if not with_manifest:
        monkeypatch.setattr("iha_jax.training.checkpoint.damage", lambda *_, **__: [])
    pattern = "*" if with_manifest else "d/*"
    rng, caught, by_fingerprints = random.Random(7 + with_manifest), 0, 0
    for attempt in range(100):
        path = shutil.copytree(saved, tmp_path / str(attempt))
        what, changed = corrupt(path / "2", rng, pattern)
        with Checkpointer(path, writable=False) as checkpoints:
            try:
                restored = checkpoints.restore(like(state()), 2)
                checkpoints.metadata(2)
            except (CheckpointCorrupt, CheckpointMismatch) as error:  # without its manifest a shape is a mismatch
                caught += 1
                by_fingerprints += "altered since it was saved" in str(error)
                continue
        assert same(restored, state(2)), what
        assert not (with_manifest and changed) or what == "delete manifest.json", what
    print(
        f"{caught} of 100 were refused, {by_fingerprints} for their fingerprints; the rest hit bytes that no one reads"
    )
    assert caught > 10
    assert with_manifest or by_fingerprints > 3


def test_another_checkpoints_arrays_in_its_place_are_found(copy):
    """Sound files, and a manifest that fits them: only the fingerprints can tell."""
    shutil.rmtree(copy / "2" / "state")
    shutil.copytree(copy / "1" / "state", copy / "2" / "state")
    (copy / "2" / "manifest.json").unlink()
    write_manifest(epath.Path(copy / "2"))
    with Checkpointer(copy, writable=False) as checkpoints, pytest.raises(CheckpointCorrupt, match="parameters/a"):
        checkpoints.restore(like(state()), 2)


def test_links_and_huge_metadata_are_refused(copy, monkeypatch):
    monkeypatch.setattr("iha_jax.training.manifest.LARGEST_JSON", 10)
    with Checkpointer(copy, writable=False) as checkpoints, pytest.raises(CheckpointCorrupt, match="larger than 10"):
        checkpoints.restore(like(state()), 2)
    monkeypatch.undo()
    file = next(p for p in (copy / "2" / "state").rglob("*") if p.is_file())
    shutil.move(file, copy / "elsewhere")
    os.symlink(copy / "elsewhere", file)
    with Checkpointer(copy, writable=False) as checkpoints, pytest.raises(CheckpointCorrupt, match="is a link"):
        checkpoints.restore(like(state()), 2)


def test_links_and_huge_metadata_are_refused_without_a_manifest_too(copy, monkeypatch):
    (copy / "2" / "manifest.json").unlink()
    monkeypatch.setattr("iha_jax.training.manifest.LARGEST_JSON", 10)
    with Checkpointer(copy, writable=False) as checkpoints, pytest.raises(CheckpointCorrupt, match="larger than 10"):
        checkpoints.restore(like(state()), 2)
    monkeypatch.undo()
    shutil.move(copy / "2" / "state", copy / "elsewhere")
    os.symlink(copy / "elsewhere", copy / "2" / "state")
    with Checkpointer(copy, writable=False) as checkpoints, pytest.raises(CheckpointCorrupt, match="is a link"):
        checkpoints.restore(like(state()), 2)


def test_code_named_in_a_checkpoint_is_not_run(copy):
    """A checkpoint made by someone else, its manifest included, that asks for a handler of its own."""
    witness = copy / "witness"
    for file in [*(copy / "2").rglob("_CHECKPOINT_METADATA"), copy / "2" / "_CHECKPOINT_METADATA"]:
        content = json.loads(file.read_text()) if file.exists() else {}
        handlers = {"state": "os.system", "metadata": f"__import__('os').system('touch {witness}')"}
        file.write_text(json.dumps(content | {"item_handlers": handlers}))
    (copy / "2" / "manifest.json").unlink()
    write_manifest(epath.Path(copy / "2"))
    with Checkpointer(copy, writable=True) as checkpoints:
        assert same(checkpoints.restore(like(state()), 2), state(2))
        checkpoints.verify(like(state()), 2)
    assert not witness.exists()


def test_a_checkpoint_that_does_not_fit_is_refused_with_every_difference(saved):
    wanted = like(state())
    wanted["parameters"]["a"] = jax.ShapeDtypeStruct((13, 9), jnp.float32)
    wanted["parameters"]["b"] = jax.ShapeDtypeStruct((5,), jnp.float32)  # never cast in silence
    wanted["parameters"]["c"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    del wanted["step"]
    with Checkpointer(saved, writable=False) as checkpoints, pytest.raises(CheckpointMismatch) as error:
        checkpoints.restore(wanted, 2)
    assert str(error.value).splitlines()[1:] == [
        "  - parameters/a: shape (13, 7) in the checkpoint, (13, 9) expected",
        "  - parameters/b: dtype bfloat16 in the checkpoint, float32 expected",
        "  - parameters/c: missing in the checkpoint",
        "  - step: only in the checkpoint",
    ]


def test_a_checkpoint_whose_manifest_a_kill_prevented_is_judged_by_its_fingerprints(copy):
    (copy / "1" / "manifest.json").unlink()
    (copy / "2" / "manifest.json").unlink()
    corrupt_array_data(copy / "2")
    with Checkpointer(copy, writable=True) as checkpoints:
        with pytest.raises(CheckpointCorrupt):
            checkpoints.restore(like(state()), 2)
        assert same(checkpoints.restore(like(state()), 1), state(1))
        checkpoints.adopt(1)
    assert damage(epath.Path(copy / "1")) == []


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    bad = state()
    bad["parameters"]["b"] = bad["parameters"]["b"].at[2].set(jnp.inf)
    with Checkpointer(tmp_path, writable=True) as checkpoints:
        with pytest.raises(StateNotFinite, match="parameters/b"):
            checkpoints.save(1, bad, metadata={})
        assert checkpoints.confirm() is None
        assert checkpoints.steps() == []


class Failing:
    """While active, no file of this process may grow beyond `limit` bytes: what a full disk or a quota looks like."""

    def __init__(self, limit):
        self.limit = limit

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


def big(seed):
    return {"parameters": {"a": jax.random.normal(jax.random.key(seed), (1009, 101))}, "step": jnp.int32(seed)}


def test_a_failed_save_is_told_within_a_step_tried_again_and_older_ones_stay(tmp_path):
    told = []
    with Checkpointer(tmp_path, writable=True) as checkpoints:
        saves = Saves(checkpoints, every=1, keep=1, verified=None, tell=told.append)
        saves.wait(1, big(1), dict)
        with Failing(100_000):
            saves.after_step(2, big(2), dict)
            while checkpoints.saving():
                pass
            saves.after_step(3, big(3), dict)
            assert len(told) == 1
            assert "saving step 2" in told[0]
            assert "MiB are free" in told[0]
            assert checkpoints.steps() == [1]  # keep = 1, and still there
            while checkpoints.saving():
                pass
        saves.wait(3, big(3), dict)
        assert checkpoints.steps() == [3]
        assert same(checkpoints.restore(like(big(0)), 3), big(3))
    assert [p.name for p in tmp_path.iterdir()] == ["3"]


def test_three_failures_end_the_run_and_name_the_last_good_checkpoint(tmp_path):
    with Checkpointer(tmp_path, writable=True) as checkpoints:
        saves = Saves(checkpoints, every=1, keep=1, verified=None, tell=lambda _: None)
        saves.wait(1, big(1), dict)
        with Failing(100_000), pytest.raises(SaveFailed, match="3 times in a row, last good checkpoint: 1"):
            saves.wait(2, big(2), dict)
        assert same(checkpoints.restore(like(big(0)), 1), big(1))


def test_retention_keeps_the_newest_and_the_last_verified(tmp_path):
    with Checkpointer(tmp_path, writable=True) as checkpoints:
        saves = Saves(checkpoints, every=2, keep=2, verified=2, tell=lambda _: None)
        for step in range(1, 9):
            saves.after_step(step, state(step), dict)
        saves.wait(8, state(8), dict)
        assert checkpoints.steps() == [2, 6, 8]
        saves.finish(9, state(9), dict)
        assert checkpoints.steps() == [8, 9]


def test_a_final_checkpoint_that_reads_back_wrong_is_saved_again(tmp_path, monkeypatch):
    told, real = [], Checkpointer.verify
    with Checkpointer(tmp_path / "checkpoints", writable=True) as checkpoints:

        def spoil_once(self, like, step):
            if not told:
                corrupt_array_data(self.path(step))
            real(self, like, step)

        monkeypatch.setattr(Checkpointer, "verify", spoil_once)
        saves = Saves(checkpoints, every=5, keep=1, verified=None, tell=told.append)
        saves.finish(5, state(5), dict)
        assert same(checkpoints.restore(like(state()), 5), state(5))
    assert len(told) == 1
    assert (tmp_path / "quarantine" / "5-1" / "state").is_dir()


def corrupt_array_data(path):
    """Flips a bit in the middle of every file that may hold arrays."""
    for file in Path(path, "state").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(bytes(content))


def test_a_checkpoint_of_format_1_loads(tmp_path):
    """A run of version 0.1, before fingerprints: 4 steps of `tests.tiny.tiny` with 3 layers."""
    with tarfile.open(Path(__file__).parent / "golden" / "format_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    config = load_run_config(str(tmp_path))
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    with Checkpointer(tmp_path / "checkpoints", writable=False) as checkpoints:
        restored = checkpoints.restore(abstract_state(config, optimizer, make_mesh(config.mesh)), 4)
        assert checkpoints.metadata(4)["tokens"] == 368
    prints = inspect({"/".join(map(str, path)): x for path, x in jax.tree_util.tree_leaves_with_path(restored)})[0]
    assert (len(prints), sum(prints.values()) % 2**32) == (105, 1569803480)


def test_a_checkpoint_of_a_later_format_names_what_can_read_it(copy):
    file = copy / "2" / "metadata" / "metadata"
    content = json.loads(file.read_text()) | {"format": 3}
    content["sha256"] = _digest({name: value for name, value in content.items() if name != "sha256"})
    file.write_text(json.dumps(content))
    (copy / "2" / "manifest.json").unlink()
    write_manifest(epath.Path(copy / "2"))
    message = "has format 3; this version of iha_jax reads 1 to 2"
    with Checkpointer(copy, writable=False) as checkpoints, pytest.raises(CheckpointMismatch, match=message):
        checkpoints.restore(like(state()), 2)
