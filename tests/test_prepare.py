"""Preparation as a user runs it: files and TFDS data sets to a data set and rows; killed, in a bucket, refused."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from iha_jax.data import documents, packing
from iha_jax.data.dataset import split_of, stdlib_dataset, write_dataset
from iha_jax.data.documents import list_files, list_stored
from iha_jax.data.jobs import run_jobs
from iha_jax.data.rows import open_rows
from iha_jax.data.text import open_text_source
from iha_jax.data.tokenizers import load_tokenizer
from tests.texts import content, read, run, snapshot, write_lines, write_texts

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_folder_becomes_a_data_set_that_tfds_reads(tmp_path):
    texts = write_texts(tmp_path / "books")
    (tmp_path / "books" / "notes.md").write_text("not asked for")
    assert run(f"--input={tmp_path / 'books'}", "--suffix=.txt", f"--output={tmp_path / 'set'}") == 0
    train, validation = read(tmp_path / "set", "train"), read(tmp_path / "set", "validation")
    assert train | validation == texts
    assert validation == {name: text for name, text in texts.items() if split_of(name) == "validation"}
    assert validation
    assert not [name for name in snapshot(tmp_path / "set") if name.startswith(".")]


def test_order_and_files_do_not_depend_on_workers(tmp_path):
    write_texts(tmp_path / "in")
    write_lines(tmp_path / "in" / "lines")
    found = []
    for workers in (1, 2):
        target = epath.Path(tmp_path / f"set{workers}")
        listing = list_files(epath.Path(tmp_path / "in"), "", "body", unit_bytes=701)
        assert len(listing.units) > 9
        write_dataset(target, listing, workers=workers)
        found.append(content(target))
    assert found[0] == found[1]
    assert sum(name.startswith("plain_text-train") for name in found[0][0]) == len(listing.units)


@pytest.mark.parametrize("unit_bytes", [1, 53, 1009, 1 << 26])
def test_every_line_belongs_to_one_unit(tmp_path, unit_bytes):
    texts = write_lines(tmp_path / "in", files=2)
    (tmp_path / "in" / "0.jsonl").write_bytes((tmp_path / "in" / "0.jsonl").read_bytes()[:-1])  # no newline at the end
    listing = list_files(epath.Path(tmp_path / "in"), ".jsonl", "body", unit_bytes=unit_bytes)
    found = [pair for unit in listing.units for pair in unit.documents()]
    assert len(found) == len(texts)
    assert dict(found) == texts


def test_an_interrupted_call_goes_on_where_it_was(tmp_path, monkeypatch):
    texts = write_lines(tmp_path / "in")
    listing = list_files(epath.Path(tmp_path / "in"), "", "body")
    whole, target = epath.Path(tmp_path / "whole"), epath.Path(tmp_path / "set")
    write_dataset(whole, listing)
    began, original = [], documents.Lines.documents

    def stopping(self):
        began.append(self.name)
        for i, document in enumerate(original(self)):
            if len(began) == 4 and i == 5:
                raise KeyboardInterrupt
            yield document

    monkeypatch.setattr(documents.Lines, "documents", stopping)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(target, listing)
    with pytest.raises(ValueError, match="was interrupted; run the same command again"):
        open_text_source(str(target), "train")
    assert began == ["0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl"]
    other = list_files(epath.Path(tmp_path / "in"), "0.jsonl", "body")
    with pytest.raises(ValueError, match="was begun with other input"):
        write_dataset(target, other)
    sizes = write_dataset(target, listing)
    assert began[4:] == ["3.jsonl", "4.jsonl", "5.jsonl", "6.jsonl"]
    assert sum(sizes.values()) == len(texts)
    assert content(target) == content(whole)
    assert write_dataset(target, listing) == sizes  # everything is there: nothing is done
    assert len(began) == 8


def test_two_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    """A second process begins and ends while the first is in the middle of a shard, of documents and of rows."""
    texts = write_lines(tmp_path / "in")
    listing, target = list_files(epath.Path(tmp_path / "in"), "", "body"), epath.Path(tmp_path / "set")
    options = dict(source=str(target), split="train", tokenizer=load_tokenizer("bytes"), context_length=23)
    original, ended = documents.Lines.documents, []

    def interrupted(self):
        for i, document in enumerate(original(self)):
            if self.name == "3.jsonl" and i == 5 and not ended:
                ended.append(None)
                ended[0] = write_dataset(target, listing)
            yield document

    monkeypatch.setattr(documents.Lines, "documents", interrupted)
    sizes = write_dataset(target, listing)
    assert ended == [sizes]
    assert read(target, "train") | read(target, "validation") == texts
    assert write_dataset(target, listing) == sizes
    tokenized, rows = packing._tokenized, []

    def overtaken(*arguments):
        for i, tokens in enumerate(tokenized(*arguments)):
            if i == 5 and not rows:
                rows.append(None)
                rows[0] = open_rows(cache_dir=str(tmp_path / "cache"), **options)
            yield tokens

    monkeypatch.setattr(packing, "_tokenized", overtaken)
    monkeypatch.setattr(packing, "MIN_SHARD_DOCUMENTS", 19)
    first = open_rows(cache_dir=str(tmp_path / "cache"), **options)
    assert first.digest == rows[0].digest
    np.testing.assert_equal([first[i] for i in range(len(first))], [rows[0][i] for i in range(len(first))])


def test_killed_and_run_again(tmp_path):
    """SIGKILL at a moment nobody chose, through the real command, with workers; none of them is left behind."""
    texts = write_lines(tmp_path / "in", files=90, lines=50)
    flags = [f"--input={tmp_path / 'in'}", "--text_feature=body", f"--output={tmp_path / 'set'}"]
    command = [sys.executable, "-m", "iha_jax.data.prepare", *flags]
    process = subprocess.Popen([*command, "--workers=2"], cwd=ROOT, stderr=subprocess.PIPE)
    parts, deadline = tmp_path / "set" / ".parts" / "hash", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if parts.exists() and len(list(parts.glob("*.json"))) > 2:
            process.kill()
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL
    process.stderr.read()  # returns when the last worker that holds the pipe has ended
    kept = {file.name: file.stat().st_mtime_ns for file in parts.glob("*.json")}
    assert 2 < len(kept) < 90
    done = subprocess.run([*command, "--workers=1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(kept)} of 90 shards are there already" in done.stderr
    assert read(tmp_path / "set", "train") | read(tmp_path / "set", "validation") == texts
    assert not parts.exists()


def test_what_is_no_text_is_left_out_by_name(tmp_path, capsys):
    texts = write_texts(tmp_path / "in")
    (tmp_path / "in" / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "in" / "nothing.txt").write_bytes(b"")
    lines = [b'{"text": "good"}', b'{"text": "caf\xe9"}', b"", b'{"text": "half \\ud83d"}']
    (tmp_path / "in" / "z.jsonl").write_bytes(b"\n".join(lines))
    assert run(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'set'}") == 0
    error = capsys.readouterr().err
    assert "left out latin1.txt: not valid UTF-8" in error
    assert "left out nothing.txt: empty" in error
    assert "left out z.jsonl@17: not valid UTF-8" in error
    assert f"left out 4 of {len(texts) + 5} documents" in error
    left_out = json.loads((tmp_path / "set" / "prepare.json").read_text())["left_out"]
    assert sorted(name for name, _ in left_out) == ["latin1.txt", "nothing.txt", "z.jsonl@17", "z.jsonl@35"]
    assert read(tmp_path / "set", "train") | read(tmp_path / "set", "validation") == texts | {"z.jsonl@0": b"good"}


def test_a_handful_of_files_still_gives_both_splits(tmp_path, capsys):
    names = [name for name in map(str, range(40)) if split_of(name) == "train"][:3]
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_text(f"text {name}")
    assert run(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'set'}") == 0
    held_out = min(names, key=documents.name_hash)
    assert read(tmp_path / "set", "validation") == {held_out: f"text {held_out}".encode()}
    assert set(read(tmp_path / "set", "train")) == set(names) - {held_out}
    assert f"validation is {held_out}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["line é\n" * 100, "漢" * 50])
def test_one_document_is_cut_and_nothing_is_in_both_splits(tmp_path, text):
    (tmp_path / "book").write_text(text)
    assert run(f"--input={tmp_path / 'book'}", f"--output={tmp_path / 'set'}") == 0
    train, validation = (b"".join(read(tmp_path / "set", s).values()).decode() for s in ("train", "validation"))
    assert train + validation == text
    assert 0 < len(validation) <= len(text) // 10
    assert "\n" not in text or train.endswith("\n")


def stored_as_tfrecord(tmp_path, lengths):
    """A TFDS data set in tfrecord, as `tfds build` leaves it, whose text is under "body"."""
    folder = tmp_path / "data_dir" / "my_text" / "1.2.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"body": tfds.features.Text(), "url": tfds.features.Text()})
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name="my_text", filetype_suffix="tfrecord")
    infos, texts = [], {}
    for split, counts in lengths.items():
        texts[split] = []
        for shard, count in enumerate(counts):
            with open(
                template.replace(split=split).sharded_filepath(shard_index=shard, num_shards=len(counts)), "wb"
            ) as f:
                for i in range(count):
                    texts[split].append(f"{split} {shard} {i} é".encode())
                    example = features.encode_example({"body": texts[split][-1], "url": "u"})
                    record = features.serialize_example(example)
                    f.write(len(record).to_bytes(8, "little") + bytes(4) + record + bytes(4))
        infos.append(tfds.core.SplitInfo(split, counts, 1, filename_template=template.replace(split=split)))
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=infos, filename_template=template, check_data=False
    )
    return texts


def test_a_tfds_name_becomes_array_record_and_rows(tmp_path, capsys):
    texts = stored_as_tfrecord(tmp_path, {"train": [5, 3, 4], "test": [2]})
    where = [f"--data_dir={tmp_path / 'data_dir'}", f"--cache_dir={tmp_path / 'cache'}", "--text_feature=body"]
    pack = ["--tokenizer=bytes", "--context_length=19", "--splits=train,test"]
    assert run("--input=my_text", *where, *pack) == 2  # no random access: says what to do
    assert "--input=my_text --output=DIR" in capsys.readouterr().err
    assert run("--input=my_text", *where, *pack, f"--output={tmp_path / 'set'}", "--workers=1") == 0
    for split in ("train", "test"):
        source = open_text_source(str(tmp_path / "set"), split)
        assert list(source.read(0, len(source), "")) == texts[split]
    assert "train: " in capsys.readouterr().out
    # And a data set in array_record, by name, straight to rows: the same rows.
    (tmp_path / "named" / "c4" / "en").mkdir(parents=True)
    (tmp_path / "set").rename(tmp_path / "named" / "c4" / "en" / "3.1.0")
    flags = [f"--data_dir={tmp_path / 'named'}", f"--cache_dir={tmp_path / 'other'}"]
    assert run("--input=c4/en", *flags, *pack, "--workers=1") == 0
    rows = [
        json.loads(next((tmp_path / cache / "rows").glob("*/rows.json")).read_text())["shard_rows"]
        for cache in ("cache", "other")
    ]
    assert rows[0] == rows[1]


def test_a_damaged_stored_shard_is_an_error(tmp_path, capsys):
    stored_as_tfrecord(tmp_path, {"train": [5, 3], "validation": [2]})
    folder = tmp_path / "data_dir" / "my_text" / "1.2.0"
    file = folder / "my_text-train.tfrecord-00001-of-00002"
    whole = file.read_bytes()
    for damaged, message in ((whole[: len(whole) // 3], "documents found, 3 recorded"), (whole[:-2], "TFRecord")):
        file.write_bytes(damaged)
        assert run(f"--input={folder}", "--text_feature=body", f"--output={tmp_path / 'set'}", "--workers=1") == 2
        error = capsys.readouterr().err
        assert message in error or "TFRecord" in error
        assert not (tmp_path / "set").exists()
    file.unlink()
    assert run(f"--input={folder}", "--text_feature=body", f"--output={tmp_path / 'set'}") == 2
    assert "00001-of-00002" in capsys.readouterr().err


def test_the_embedded_source_is_the_standard_library(tmp_path):
    began = time.monotonic()
    directory = stdlib_dataset(str(tmp_path))
    assert time.monotonic() - began < 60
    found = read(directory, "train") | read(directory, "validation")
    assert found["json/decoder.py"] == Path(json.decoder.__file__).read_bytes()
    assert not [name for name in found if "/test/" in name or "site-packages" in name]
    assert 0.02 < len(read(directory, "validation")) / len(found) < 0.09
    again = list_stored("stdlib", ["train", "validation"], data_dir="", cache_dir=str(tmp_path), text_feature="text")
    assert write_dataset(epath.Path(tmp_path / "copy"), again)["train"] == len(read(directory, "train"))


BAD = {
    "no such folder": (["--input={0}/none", "--output={1}"], "no such file or folder"),
    "no such name": (["--input=imdb_review", "--output={1}"], "did you mean 'imdb_reviews'"),
    "a name not prepared": (["--input=c4/en", "--data_dir={0}", "--output={1}"], "nothing is downloaded"),
    "another hub": (["--input=huggingface:c4", "--output={1}"], "neither 'stdlib', a prepared directory"),
    "no file with the suffix": (["--input={0}/in", "--suffix=.rst", "--output={1}"], "no file with suffix '.rst'"),
    "no valid text": (["--input={0}/binary", "--output={1}"], "no document is valid UTF-8 text"),
    "one document of one byte": (["--input={0}/in/a/000.txt", "--output={1}"], "too short to cut"),
    "malformed line": (["--input={0}/lines", "--output={1}"], "1.jsonl, line 3: expected a JSON object"),
    "line without the feature": (
        ["--input={0}/lines/0.jsonl", "--text_feature=txt", "--output={1}"],
        "line 1: expected",
    ),
    "splits of files": (["--input={0}/in", "--splits=train,test", "--output={1}"], "'test' is neither train"),
    "no split": (["--input={0}/set", "--splits=test", "--output={1}"], "no split 'test'; its splits: 'train', 'valid"),
    "no feature": (["--input={0}/set", "--text_feature=x", "--output={1}"], "it has ['path', 'text']"),
    "no split to pack": (["--input={0}/set", "--splits=test", "--tokenizer=bytes", "--context_length=9"], "no split"),
    "text to pack": (["--input={0}/in", "--tokenizer=bytes", "--context_length=9"], "holds no TFDS data set"),
    "nothing to do": (["--input={0}/in"], "nothing to do"),
    "workers": (["--input={0}/in", "--output={1}", "--workers=0"], "--workers=0: expected at least 1"),
    "context": (["--input={0}/in", "--output={1}", "--tokenizer=bytes"], "expected both or neither"),
    "tokenizer": (
        ["--input={0}/in", "--output={1}", "--tokenizer=byte", "--context_length=9"],
        "expected 'bytes', 'hf:",
    ),
    "output in input": (["--input={0}/in", "--output={0}/in/set"], "lies in --input"),
    "output is a file": (["--input={0}/in", "--output={0}/binary"], "is no data set of this command"),
    "output is other files": (["--input={0}/in", "--output={0}/lines"], "is no data set of this command"),
    "output is another set": (["--input={0}/in", "--output={0}/set", "--suffix=0.txt"], "holds other input"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_texts(folder / "in")
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    (folder / "lines").mkdir()
    (folder / "lines" / "0.jsonl").write_text('{"text": "fine"}\n' * 5)
    (folder / "lines" / "1.jsonl").write_text('{"text": "fine"}\n\n{"text": 3}\n')
    assert run(f"--input={folder / 'in'}", f"--output={folder / 'set'}") == 0
    return folder


@pytest.mark.parametrize("case", BAD)
def test_unusable_input_is_refused_and_nothing_written(inputs, tmp_path, case, capsys, monkeypatch):
    monkeypatch.setenv("IHA_JAX_CACHE", str(tmp_path / "cache"))
    flags, message = BAD[case]
    before = snapshot(inputs)
    assert run(*(flag.format(inputs, tmp_path / "out") for flag in flags)) == 2
    error = capsys.readouterr().err
    assert "refused: " in error
    assert message in error
    assert snapshot(inputs) == before
    assert not os.listdir(tmp_path)


class Screen(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self._terminal = terminal

    def isatty(self):
        return self._terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path, terminal):
    screen, folder = Screen(terminal), epath.Path(tmp_path / "parts")
    jobs = [(i,) for i in range(5)]

    def square(i):
        if i == 3 and not (folder / "00002.json").exists():
            raise AssertionError("out of order")
        return {"square": i * i}

    found = run_jobs(square, jobs[:3], folder, workers=1, label="squares", stream=Screen(False))
    assert [facts["square"] for facts in found] == [0, 1, 4]
    found = run_jobs(square, jobs, folder, workers=1, label="squares", stream=screen)
    assert [facts["square"] for facts in found] == [0, 1, 4, 9, 16]
    if terminal:
        assert "squares: 100%" in screen.getvalue()
        assert "5/5" in screen.getvalue()
        assert "\r" in screen.getvalue()
    else:
        lines = ["squares: 3 of 5 shards are there already", "squares: 5 of 5 shards, 0 s left"]
        assert screen.getvalue().splitlines() == lines
