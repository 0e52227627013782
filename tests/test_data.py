"""From documents to batches: packing, rows on disk, and an order that depends on seed and step alone."""

import itertools
import json
import os

import numpy as np
import pytest
from etils import epath

from iha_jax.data import packing
from iha_jax.data.batches import train_batches, validation_batches
from iha_jax.data.corpus import open_corpus
from iha_jax.data.dataset import write_dataset
from iha_jax.data.documents import list_files
from iha_jax.data.packing import cut_rows, row_dtype
from iha_jax.data.rows import open_rows
from iha_jax.data.tokenizers import load_tokenizer
from iha_jax.training.run_directory import DataMismatch, check_data
from tests.tiny import tiny
from tests.tiny_tokenizers import huggingface

# --- Packing.


def naive_rows(documents, N):
    """Rows by loops over single tokens: (tokens, segment ids), each of N + 1."""
    stream = [(token, owner) for owner, document in enumerate(documents) for token in document]
    rows = []
    for start in range(0, max(len(stream) - 1, 0), N):
        part = stream[start : start + N + 1]
        tokens, segments = [], []
        for token, owner in part:
            tokens.append(token)
            segments.append(owner - part[0][1] + 1)
        missing = N + 1 - len(part)
        rows.append((tokens + [0] * missing, segments + [0] * missing))
    return rows


@pytest.mark.parametrize("N", [1, 2, 7, 23, 1009])
def test_rows_are_the_stream_cut_at_every_n(N, monkeypatch):
    monkeypatch.setattr(packing, "_CUT_TOKENS", 17)  # long documents are cut in several goes
    rng = np.random.default_rng(N)
    documents = [rng.integers(1, 99, size).astype(np.int32) for size in (3, 2, 40, 7, 2, 2, 2, 101, 3, 5)]
    found = np.concatenate(list(cut_rows(iter(documents), row_dtype(99, N))))
    expected = naive_rows(documents, N)
    np.testing.assert_array_equal(found["tokens"], [tokens for tokens, _ in expected])
    np.testing.assert_array_equal(found["segment_ids"], [segments for _, segments in expected])
    # Every token of the stream but the first is a target exactly once, in order.
    targets = found["tokens"][:, 1:][found["segment_ids"][:, 1:] > 0]
    np.testing.assert_array_equal(targets, np.concatenate(documents)[1:])


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_a_stream_that_ends_with_a_row_makes_no_empty_one(whole):
    rows = list(cut_rows(iter([np.arange(1 + 5 * whole, dtype=np.int32)]), row_dtype(99, 5)))
    assert sum(map(len, rows)) == whole


def test_row_integers_are_as_small_as_they_may_be():
    assert row_dtype(2**16, 5).itemsize == 6 * 4 + 4
    assert row_dtype(2**16 + 1, 5).itemsize == 6 * 6 + 4
    assert row_dtype(257, 2**16 - 2)["segment_ids"].base == np.uint16
    assert row_dtype(257, 2**16 - 1)["segment_ids"].base == np.uint32


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set of 97 documents of 1 to 300 bytes, and the folder it was made from."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "in").mkdir()
    for i in range(97):
        (folder / "in" / f"{i:03d}").write_text((f"document {i} é漢 " * 20)[: 1 + i * 7 % 300])
    write_dataset(epath.Path(folder / "set"), list_files(epath.Path(folder / "in"), "", "text"))
    return folder


def rows_of(prepared, cache, **changes):
    options = dict(source=str(prepared / "set"), split="train", context_length=23, cache_dir=str(cache))
    return open_rows(**(options | dict(tokenizer=load_tokenizer("bytes")) | changes))


def everything(rows):
    return [np.concatenate([*rows[i].values()]).tolist() for i in range(len(rows))]


def test_shards_make_the_rows_and_workers_do_not(prepared, tmp_path, monkeypatch):
    """Five shards, by one process and by three, interrupted and not: the same rows and digests."""
    monkeypatch.setattr(packing, "MIN_SHARD_DOCUMENTS", 19)
    alone = rows_of(prepared, tmp_path / "alone")
    assert rows_of(prepared, tmp_path / "many", workers=3).digest == alone.digest
    many = rows_of(prepared, tmp_path / "many")
    assert everything(many) == everything(alone)
    facts = json.loads(next((tmp_path / "many" / "rows").glob("*/rows.json")).read_text())
    assert len(facts["shard_rows"]) == 5
    # Each shard is the stream of its documents, cut.
    tokenizer, documents = load_tokenizer("bytes"), packing.open_text_source(str(prepared / "set"), "train")
    texts = list(documents.read(0, len(documents), ""))
    expected = []
    for start in range(0, len(texts), 19):
        stream = [[256, *text, 256] for text in texts[start : start + 19]]
        expected += [tokens + segments for tokens, segments in naive_rows(stream, 23)]
    assert everything(alone) == expected
    assert alone.num_tokens == sum(len(text) + 2 for text in texts)
    assert (alone.num_documents, alone.num_bytes) == (len(texts), sum(map(len, texts)))
    assert alone.max_token_id == tokenizer.document_id


def test_packing_goes_on_where_it_was(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARD_DOCUMENTS", 19)
    began, original = [], packing._pack_shard

    def stopping(*job):
        began.append(job[4])
        if len(began) == 3:
            raise KeyboardInterrupt
        return original(*job)

    monkeypatch.setattr(packing, "_pack_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        rows_of(prepared, tmp_path)
    resumed = rows_of(prepared, tmp_path)
    assert began == [0, 1, 2, 2, 3, 4]
    assert resumed.digest == rows_of(prepared, tmp_path / "other").digest
    assert sorted(os.listdir(next((tmp_path / "rows").iterdir()))) == [
        *(f"rows-{i:05d}.bin" for i in range(5)),
        "rows.json",
    ]


def test_digests_change_with_what_they_name_and_with_nothing_else(prepared, tmp_path):
    first = rows_of(prepared, tmp_path / "1")
    again = rows_of(prepared, tmp_path / "2")
    assert (again.digest, again.corpus_digest) == (first.digest, first.corpus_digest)
    longer = rows_of(prepared, tmp_path / "1", context_length=29)
    assert longer.corpus_digest == first.corpus_digest
    other = rows_of(prepared, tmp_path / "1", tokenizer=load_tokenizer(huggingface("byte-level", tmp_path)))
    assert other.corpus_digest == first.corpus_digest
    # The same files prepared again, elsewhere; and with one letter changed.
    copies = []
    for name, letter in (("same", ""), ("changed", "x")):
        folder = tmp_path / name
        folder.mkdir()
        for file in (prepared / "in").iterdir():
            (folder / file.name).write_text(file.read_text() + (letter if file.name == "011" else ""))
        write_dataset(epath.Path(tmp_path / f"set-{name}"), list_files(epath.Path(folder), "", "text"))
        copies.append(rows_of(prepared, tmp_path / "1", source=str(tmp_path / f"set-{name}")))
    assert copies[0].digest == first.digest
    assert copies[1].corpus_digest != first.corpus_digest
    assert len({r.digest for r in (first, longer, other, copies[1])}) == 4


def test_token_ids_outside_the_vocabulary_are_an_error(prepared, tmp_path, monkeypatch):
    from iha_jax.data.tokenizers import Bytes

    monkeypatch.setattr(Bytes, "vocab_size", 200)
    with pytest.raises(ValueError, match=r"gave ids \d+ to 2\d\d; its vocabulary has 200"):
        rows_of(prepared, tmp_path)
    assert not list((tmp_path / "rows").iterdir())


def test_a_tokenizer_that_changes_text_is_said_to(prepared, tmp_path, capsys):
    rows_of(prepared, tmp_path, tokenizer=load_tokenizer(huggingface("wordpiece", tmp_path)))
    assert "this tokenizer changes text" in capsys.readouterr().err
    rows_of(prepared, tmp_path)
    assert "this tokenizer changes text" not in capsys.readouterr().err


def test_altered_rows_are_refused_by_name(prepared, tmp_path):
    rows_of(prepared, tmp_path)
    file = next((tmp_path / "rows").glob("*/rows-00000.bin"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"rows-00000.bin has \d+ bytes, expected \d+"):
        rows_of(prepared, tmp_path)
    itemsize, rng = row_dtype(257, 23).itemsize, np.random.default_rng(0)
    for _ in range(20):
        flipped, at = bytearray(whole), int(rng.integers(len(whole)))
        flipped[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(flipped))
        altered = rows_of(prepared, tmp_path)
        with pytest.raises(ValueError, match=rf"rows-00000.bin: row {at // itemsize} was altered"):
            altered[at // itemsize]
        assert altered[at // itemsize - 1]["tokens"].max() < 257  # others are read
    file.unlink()
    with pytest.raises(ValueError, match=r"rows-00000.bin has None bytes"):
        rows_of(prepared, tmp_path)
    facts = file.parent / "rows.json"
    facts.write_text(facts.read_text().replace('"context_length": 23', '"context_length": 24'))
    with pytest.raises(ValueError, match="context_length is 24, expected 23"):
        rows_of(prepared, tmp_path)


def test_changed_text_under_a_run_is_a_named_error(tmp_path):
    def prepare(letter):
        for i in range(30):
            (tmp_path / "in").mkdir(exist_ok=True)
            (tmp_path / "in" / f"{i}").write_text(f"text {i} {letter}" * 9)
        epath.Path(tmp_path / "set").rmtree(missing_ok=True)
        write_dataset(epath.Path(tmp_path / "set"), list_files(epath.Path(tmp_path / "in"), "", "text"))
        config = tiny(data__sources=(str(tmp_path / "set"),), data__cache_dir=str(tmp_path / "cache"))
        return open_corpus(config).digests

    before = prepare("a")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "provenance.json").write_text(json.dumps(before | {"runs": []}))
    check_data(str(tmp_path / "run"), prepare("a"))  # prepared again from the same text: the same
    with pytest.raises(DataMismatch, match="corpus_digest"):
        check_data(str(tmp_path / "run"), prepare("b"))


# --- Batches.


class Numbers:
    """Rows whose tokens all say which row of which source they are; they can be told apart and counted."""

    is_local = True

    def __init__(self, count, base=0):
        self.count, self.base = count, base

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"tokens": np.full(4, self.base + int(index), np.int32), "segment_ids": np.ones(4, np.int32)}


def ids(batches, steps):
    return [next(batches)["inputs"][:, 0].tolist() for _ in range(steps)]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def test_epochs_hold_every_row_once_and_are_shuffled_anew():
    found = flat(ids(train_batches([Numbers(35)], [1], seed=3, batch_size=5, start_step=0), 21))
    epochs = [found[i : i + 35] for i in range(0, 105, 35)]
    assert all(sorted(epoch) == list(range(35)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(35))}) == 4


def test_order_is_a_function_of_seed_and_step_alone():
    sources, weights = [Numbers(31), Numbers(13, 1000)], [3.0, 1.0]

    def batches(**changes):
        options = dict(seed=5, batch_size=6, start_step=0)
        return train_batches(sources, weights, **(options | changes))

    whole = ids(batches(), 12)
    assert whole == ids(batches(), 12)
    assert whole != ids(batches(seed=6), 12)
    for start in (1, 7, 11):
        assert ids(batches(start_step=start), 12 - start) == whole[start:]
    for rows in ([0, 1, 2], [1, 5], [3]):
        assert ids(batches(local_rows=rows, start_step=4), 5) == [[step[row] for row in rows] for step in whole[4:9]]


def test_loader_processes_change_nothing(prepared, tmp_path):
    rows = [rows_of(prepared, tmp_path)]
    options = dict(seed=1, batch_size=4, start_step=3)
    alone, many = (train_batches(rows, [1.0], workers=n, **options) for n in (0, 2))
    for _ in range(5):
        np.testing.assert_equal(next(many), next(alone))


def test_sources_are_mixed_by_weight():
    sources, weights = [Numbers(31), Numbers(13, 1000), Numbers(7, 2000)], [6.0, 3.0, 1.0]
    found = np.array(flat(ids(train_batches(sources, weights, seed=0, batch_size=10, start_step=0), 60)))
    assert [int((found // 1000 == i).sum()) for i in range(3)] == [360, 180, 60]
    assert sorted(found[found < 1000][:31]) == list(range(31))  # and each source by epochs of its own


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_far_steps_are_reached_at_once(seed):
    batches = train_batches([Numbers(31), Numbers(13)], [1.0, 2.0], seed=seed, batch_size=16, start_step=10**9)
    assert next(batches)["inputs"].shape == (16, 3)


def test_an_empty_batch_and_rows_that_are_not_of_it_are_refused():
    with pytest.raises(ValueError, match="batch_size = 0"):
        train_batches([Numbers(3)], [1], seed=0, batch_size=0, start_step=0)
    for rows in ([], [-1], [0, 5]):
        with pytest.raises(ValueError, match="local_rows"):
            train_batches([Numbers(3)], [1], seed=0, batch_size=5, start_step=0, local_rows=rows)
    with pytest.raises(ValueError, match="no rows"):
        train_batches([Numbers(3), Numbers(0)], [1, 1], seed=0, batch_size=2, start_step=0)


def test_the_mask_keeps_documents_apart_and_padding_out(prepared, tmp_path):
    rows = rows_of(prepared, tmp_path)
    total = 0
    for batch in validation_batches(rows, batch_size=5, num_rows=None):
        assert batch["inputs"].shape == (5, 23)
        inputs, targets, segments = batch["inputs"], batch["targets"], batch["segment_ids"]
        counted = batch["loss_mask"] > 0
        assert not (counted & (segments == 0)).any()
        # A separator that ends a document is a target; one that begins the next document is not.
        assert not ((inputs == 256) & (targets == 256) & counted).any()
        total += int(counted.sum())
    assert total == rows.num_tokens - rows.num_documents  # every token and end of a document, once


def test_validation_rows_are_the_same_and_spread(prepared, tmp_path):
    rows = rows_of(prepared, tmp_path)
    first, second = (list(validation_batches(rows, batch_size=4, num_rows=7)) for _ in range(2))
    np.testing.assert_equal(first, second)
    some = list(validation_batches(rows, batch_size=4, num_rows=7, local_rows=[1, 3]))  # row 3 of the second is padding
    np.testing.assert_equal(some, [{name: x[[1, 3]] for name, x in batch.items()} for batch in first])
    found = np.concatenate([batch["inputs"] for batch in first])
    chosen = [i * len(rows) // 7 for i in range(7)]
    np.testing.assert_array_equal(found[:7], [rows[i]["tokens"][:-1] for i in chosen])
    assert not found[7:].any()
    assert not first[-1]["loss_mask"][3:].any()
