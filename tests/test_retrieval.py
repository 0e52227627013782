"""Generated retrieval: texts that can be answered, held-out keys, rows of (seed, index), right answers counted."""

import json
import re

import jax
import numpy as np
import pytest

from iha_jax.comparison.report import report
from iha_jax.data.batches import example, train_batches
from iha_jax.data.corpus import open_corpus
from iha_jax.data.retrieval import HELD_OUT, LONGEST, QUERIES, SHORTEST, TRAINED, RetrievalRows, evaluation_lengths
from iha_jax.data.tokenizers import Bytes, load_tokenizer
from iha_jax.evaluation.retrieval import make_exact_step, metric_name
from iha_jax.model import bind, initialize
from iha_jax.training.loop import admit, train
from tests.comparisons import write_run, written
from tests.test_training import rows as metrics
from tests.tiny import tiny
from tests.tiny_tokenizers import huggingface


def made(split, length=150, source="retrieval"):
    return RetrievalRows(source, split, Bytes(), length)


def texts(row):
    """(text, is a token counted) of each segment, its separator checked and left out."""
    for segment in range(1, row["segment_ids"].max() + 1):
        here = row["segment_ids"] == segment
        assert row["tokens"][here][0] == 256
        yield bytes(row["tokens"][here][1:].tolist()).decode(), row["counted"][here][1:]


def read(text):
    assert re.fullmatch(r"([a-z]{2}[A-Z\d])+", text)
    return re.findall(r"([a-z]{2})([A-Z\d])", text)


@pytest.mark.parametrize("split", ["train", "validation", "trained", "held_out"])
def test_every_answer_stands_in_its_text_and_only_answers_count(split):
    found, distractors = made(split), 0
    for i in range(0, 6000, 97):
        for text, counted in texts(found[i]):
            facts = {}
            expected = []
            for key, value in read(text):
                expected += [0, 0, int(key in facts)]
                assert facts.setdefault(key, value) == value
            assert counted.tolist() == expected
            distractors += len(facts)
            if split != "train":
                queries = expected.index(1) // 3
                assert sum(expected) == QUERIES
                assert len(read(text)) - queries == QUERIES  # behind all needles
    assert distractors > 500


def test_no_trained_text_has_a_held_out_key_and_both_kinds_are_asked_for():
    held_out = {chr(97 + key // 26) + chr(97 + key % 26) for key in HELD_OUT}
    assert 40 < len(held_out) < 100
    assert len(TRAINED) + len(HELD_OUT) == 26 * 26

    def keys(split, asked):
        for i in range(300):
            for text, counted in texts(made(split)[i]):
                items = read(text)
                yield from (key for (key, _), c in zip(items, counted[2::3], strict=True) if c or not asked)

    assert not held_out & set(keys("train", asked=False))
    assert not held_out & set(keys("trained", asked=True))
    assert held_out & set(keys("trained", asked=False))
    assert set(keys("held_out", asked=True)) <= held_out
    assert set(keys("validation", asked=True)) <= held_out


def test_lengths_are_exact_and_evaluation_goes_beyond_training():
    assert evaluation_lengths(152) == (38, 76, 152, 304, 608)
    for length in (SHORTEST, 152, 153, 154, 608, LONGEST):
        row = made("held_out", length)[5]
        used = int((row["segment_ids"] > 0).sum())
        assert length - 2 < used <= length + 1
        assert row["tokens"].shape == (length + 1,)


def test_rows_are_a_function_of_seed_split_and_index():
    first, again, other = made("train"), made("train"), made("train", source="retrieval:7")
    for i in (0, 1, len(first) - 1):
        np.testing.assert_array_equal(first[i]["tokens"], again[i]["tokens"])
        assert (first[i]["tokens"] != other[i]["tokens"]).any()
    assert (first[0]["tokens"] != first[1]["tokens"]).any()
    assert (first.digest, first.corpus_digest) == (again.digest, again.corpus_digest)
    assert other.corpus_digest != first.corpus_digest != made("validation").digest
    whole = train_batches([first], [1.0], seed=3, batch_size=4, start_step=0)
    third = [next(whole) for _ in range(3)][2]
    resumed = next(train_batches([first], [1.0], seed=3, batch_size=4, start_step=2))
    np.testing.assert_array_equal(third["inputs"], resumed["inputs"])
    assert third["loss_mask"].sum() > 0


def test_right_answers_are_counted_as_a_loop_does():
    """Answers of one, two and three tokens, some of them at the end of a row; the model's own argmax with errors."""
    config = tiny(model__num_layers=1, model__layer_pattern=("mha",))
    parameters = initialize(config.model, jax.random.key(0))
    rng = np.random.default_rng(0)
    inputs, segments = rng.integers(0, 257, (5, 23)).astype(np.int32), np.ones((5, 23), np.int32)
    best = np.array(bind(config.model, parameters)(inputs, segments).argmax(-1), np.int32)
    mask = np.zeros((5, 23), np.float32)
    answers = [(row, start, start + size) for row in range(5) for start, size in ((0, 1), (3, 2), (9, 3), (20, 3))]
    targets = np.where(rng.random((5, 23)) < 0.25, (best + 1) % 257, best)
    for row, start, stop in answers:
        mask[row, start:stop] = 1
    expected = sum(bool((targets[r, a:b] == best[r, a:b]).all()) for r, a, b in answers)
    batch = {"inputs": inputs, "targets": targets, "segment_ids": segments, "loss_mask": mask}
    right, asked = jax.jit(make_exact_step(config))(parameters, batch)
    assert (int(right), int(asked)) == (expected, len(answers))
    assert 3 < expected < len(answers) - 3


@pytest.mark.slow
def test_a_run_measures_accuracy_at_every_length(tmp_path):
    changes = dict(model__num_layers=1, model__layer_pattern=("mha",), model__implementation="reference")
    changes |= dict(model__context_length=100, training__eval_rows=4)
    config = tiny(data__sources=("retrieval",), training__steps=4, training__eval_every=4, **changes)
    assert train(admit(config, str(tmp_path / "run"))) == 0
    last = metrics(tmp_path / "run", "val")[-1]
    names = [metric_name(keys, n) for keys in ("trained", "held_out") for n in (25, 50, 100, 200, 400)]
    assert all(0 <= last[name] <= 1 for name in names)
    counted = example(open_corpus(config).train[0][0])["loss_mask"].sum()
    assert 0 < counted < 60


def test_a_report_has_accuracy_by_length_with_intervals(tmp_path):
    comparison, workdir, runs = written(tmp_path, lambda arm, seed, rate: 3.0 + seed)
    for run in runs:
        path = workdir / run.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            for keys in ("trained", "held_out"):
                line |= {metric_name(keys, n): 0.5 + 0.1 * run.seed + 0.2 * (run.arm == "iha") for n in (32, 1024)}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report(comparison, str(workdir), runs)
    lines = [line.split() for line in text.splitlines() if line.strip().startswith(("trained ", "held_out "))]
    assert [line[:2] for line in lines] == [[k, n] for k in ("trained", "held_out") for n in ("32", "1024")]
    # n = 2: 12.7062 * 0.05 = 0.635; the difference is 0.2 for both seeds.
    expected = "0.550 ± 0.635 (n=2) 0.750 ± 0.635 (n=2) 0.200 ± 0.000 (n=2)"
    assert all(" ".join(line[2:]) == expected for line in lines)
    assert (workdir / "comparison_lengths.png").stat().st_size > 10_000
    assert "| held_out | 1024 | 0.550 ± 0.635 (n=2) |" in (workdir / "comparison.md").read_text()


def test_a_report_without_accuracies_says_nothing_of_them(tmp_path):
    comparison, workdir, runs = written(tmp_path, lambda arm, seed, rate: 3.0 + seed)
    write_run(workdir / "other", runs[0], runs[0].config(), 2.0)
    assert "Right answers" not in report(comparison, str(workdir), runs)
    assert not (workdir / "comparison_lengths.png").exists()


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"retrieval:x.*whole number"):
        made("train", source="retrieval:x")
    with pytest.raises(ValueError, match="has no split 'test'; its splits: train, validation"):
        made("test")
    with pytest.raises(ValueError, match=r"needs config\.data\.tokenizer = 'bytes'"):
        RetrievalRows("retrieval", "train", load_tokenizer(huggingface("byte-level", tmp_path)), 150)
    for length in (23, 2000):
        with pytest.raises(ValueError, match=r"so 100 to \d+ for config\.model\.context_length"):
            open_corpus(tiny(data__sources=("retrieval",), model__context_length=length))
