"""Small texts to prepare, the command that does, and what it left."""

import json
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from iha_jax.data import prepare


def write_texts(folder, count=31):
    """`count` files in two levels, of sizes from 1 byte on, with letters of more than a byte."""
    texts = {f"{'ab'[i % 2]}/{i:03d}.txt": f"{i} é漢🎉 ".encode() * (1 + i * 5 % 17) for i in range(count)}
    texts["a/000.txt"] = b"x"
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return texts


def write_lines(folder, files=7, lines=11):
    texts = {}
    for f in range(files):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{f}.jsonl", "wb") as file:
            for i in range(lines):
                texts[f"{f}.jsonl@{file.tell()}"] = text = f"file {f} line {i} é" * (1 + i)
                file.write(json.dumps({"body": text, "other": 1}, ensure_ascii=i % 2 == 0).encode() + b"\n")
    return {name: text.encode() for name, text in texts.items()}


def read(directory, split):
    """Path -> text, as TFDS itself gives them."""
    source = tfds.builder_from_directory(directory).as_data_source(split)
    pairs = [(example["path"], example["text"]) for example in source]
    assert len({path for path, _ in pairs}) == len(pairs)
    return {(p if isinstance(p, str) else p.decode()): (t.encode() if isinstance(t, str) else t) for p, t in pairs}


def content(directory):
    """Names of all files, metadata, and the documents in order: TFDS's records have no one order of their features."""
    directory = Path(directory)
    names = sorted(str(f.relative_to(directory)) for f in directory.rglob("*") if f.is_file())
    ordered = [list(read(directory, split).items()) for split in ("train", "validation")]
    return names, (directory / "dataset_info.json").read_text(), (directory / "prepare.json").read_text(), ordered


def run(*flags):
    with pytest.raises(SystemExit) as end:
        prepare.main([str(flag) for flag in flags])
    return end.value.code


def snapshot(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
