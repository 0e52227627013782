"""Preparation into and out of a bucket, with a stand-in for one."""

from pathlib import Path

import numpy as np
from etils import epath

from iha_jax.data import packing
from iha_jax.data.dataset import write_dataset
from iha_jax.data.documents import list_files
from iha_jax.data.rows import open_rows
from iha_jax.data.tokenizers import load_tokenizer
from tests.bucket import use_bucket
from tests.texts import read, run, snapshot, write_lines, write_texts


def test_everything_in_a_bucket_equals_everything_here(tmp_path, monkeypatch):
    buckets = use_bucket(tmp_path, monkeypatch)
    texts = write_texts(tmp_path / "in") | write_lines(tmp_path / "in", files=3)
    write_texts(buckets / "mine" / "in")
    write_lines(buckets / "mine" / "in", files=3)
    pack = ["--tokenizer=bytes", "--context_length=23", "--text_feature=body"]
    here = [f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'set'}", f"--cache_dir={tmp_path / 'cache'}"]
    assert run(*here, *pack, "--workers=1") == 0
    there = ["--input=gs://mine/in", "--output=gs://mine/set", "--cache_dir=gs://mine/cache"]
    assert run(*there, *pack, "--workers=2") == 0
    assert read(buckets / "mine" / "set", "train") | read(buckets / "mine" / "set", "validation") == texts
    options = dict(tokenizer=load_tokenizer("bytes"), context_length=23)
    for split in ("train", "validation"):
        local = open_rows(source=str(tmp_path / "set"), split=split, cache_dir=str(tmp_path / "cache"), **options)
        remote = open_rows(source="gs://mine/set", split=split, cache_dir="gs://mine/cache", **options)
        assert not remote.is_local
        assert remote.digest == local.digest
        assert len(remote) == len(local) > 0
        for i in range(0, len(local), 7):
            np.testing.assert_equal(remote[i], local[i])
    assert {file.name for file in (buckets / "mine" / "cache" / "rows").rglob("*") if file.is_file()} == {
        "rows.json",
        "rows-00000.bin",
    }
    # A TFDS data set in the bucket is rewritten too, and the same command again changes nothing.
    again = ["--input=gs://mine/set", "--output=gs://mine/copy", "--workers=1"]
    assert run(*again) == 0
    copied = snapshot(buckets / "mine" / "copy")
    assert run(*again) == 0
    assert snapshot(buckets / "mine" / "copy") == copied
    assert sorted(read(buckets / "mine" / "copy", "train").values()) == sorted(
        read(buckets / "mine" / "set", "train").values()
    )


def test_a_bucket_is_copied_file_by_file_and_no_longer_than_needed(tmp_path, monkeypatch):
    buckets = use_bucket(tmp_path, monkeypatch)
    monkeypatch.setattr(packing, "MIN_SHARD_DOCUMENTS", 7)
    write_texts(tmp_path / "in")
    listing = list_files(epath.Path(tmp_path / "in"), "", "text", unit_bytes=701)
    for target in (epath.Path(tmp_path / "set"), epath.Path("gs://mine/set")):
        write_dataset(target, listing)
    held, original = [], packing._pack_shard

    def watching(*job):
        facts = original(*job)
        held.append(len(list(Path(job[-1]).glob("*.array_record*"))))
        return facts

    options = dict(
        split="train", tokenizer=load_tokenizer("bytes"), context_length=23, cache_dir=str(tmp_path / "cache")
    )
    local = open_rows(source=str(tmp_path / "set"), **options)
    monkeypatch.setattr(packing, "_pack_shard", watching)
    remote = open_rows(source="gs://mine/set", **options)
    assert remote.digest == local.digest
    files = len(list((buckets / "mine" / "set").glob("*-train.array_record*")))
    assert len(held) == 4
    assert 0 < min(held) <= max(held) < files - 2


def test_a_bucket_without_its_library_is_refused(tmp_path, capsys):
    write_texts(tmp_path / "in")
    assert run(f"--input={tmp_path / 'in'}", "--output=s3://mine/set") == 2
    assert "s3fs" in capsys.readouterr().err
    assert run("--input=s3://mine/set", "--tokenizer=bytes", "--context_length=5") == 2
