"""Generated retrieval: texts that can be answered, held-out keys, rows of (seed, index), right answers counted."""

import json
import re

import jax
import numpy as np
import pytest

from iha_jax.comparison.report import report
from iha_jax.data.batches import example, train_batches
from iha_jax.data.corpus import open_corpus
from iha_jax.data.retrieval import IS_HELD_OUT, KEYS, NEEDLES, QUERIES, SHORTEST, RetrievalRows, evaluation_lengths
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
    """(key, value, where its value stands) of every needle and query; what is between them is noise."""
    assert re.fullmatch(r"([\[\\\]^_`{|}~]|[a-zA-Z][!-@])*", text)
    return [(*match.group(), match.start() + 1) for match in re.finditer(r"[a-zA-Z][!-@]", text)]


@pytest.mark.parametrize("split", ["train", "validation", "trained", "held_out"])
def test_every_answer_stands_in_its_text_and_only_answers_count(split):
    found, needles, noise = made(split), 0, 0
    for i in range(0, 6000, 97):
        for text, counted in texts(found[i]):
            facts, expected = {}, np.zeros(len(text), int)
            for key, value, at in read(text):
                expected[at] = key in facts
                assert facts.setdefault(key, value) == value
            assert counted.tolist() == expected.tolist()
            assert 2 <= len(facts) <= NEEDLES
            needles += len(facts)
            noise += len(text) - 2 * len(read(text))
            if split != "train":
                assert (len(facts), expected.sum()) == (NEEDLES, QUERIES)
                assert expected[: -2 * QUERIES].sum() == 0  # behind all needles
    assert needles > 500
    assert (noise > 500) == (split != "train")


def test_held_out_keys_are_distractors_in_training_and_never_asked_for():
    held_out = {chr(key) for key in KEYS[IS_HELD_OUT]}
    assert len(held_out) == QUERIES

    def keys(split, asked):
        for i in range(300):
            for text, counted in texts(made(split)[i]):
                yield from (key for key, _, at in read(text) if counted[at] or not asked)

    assert held_out < set(keys("train", asked=False))
    assert not held_out & set(keys("train", asked=True))
    assert not held_out & set(keys("trained", asked=True))
    assert set(keys("held_out", asked=True)) == held_out
    assert set(keys("validation", asked=True)) <= held_out


def test_lengths_are_exact_and_evaluation_goes_beyond_training():
    assert evaluation_lengths(172) == (43, 86, 172, 344, 688)
    for length in (SHORTEST, 152, 153, 688):
        row = made("held_out", length)[5]
        assert row["segment_ids"].tolist() == [1] * (length + 1)
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
    changes |= dict(model__context_length=164, training__eval_rows=4)
    config = tiny(data__sources=("retrieval",), training__steps=4, training__eval_every=4, **changes)
    assert train(admit(config, str(tmp_path / "run"))) == 0
    last = metrics(tmp_path / "run", "val")[-1]
    names = [metric_name(keys, n) for keys in ("trained", "held_out") for n in (41, 82, 164, 328, 656)]
    assert all(0 <= last[name] <= 1 for name in names)
    counted = example(open_corpus(config).train[0][0])["loss_mask"].sum()
    assert 0 < counted < 82


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
    with pytest.raises(ValueError, match=r"so 164 or more for config\.model\.context_length"):
        open_corpus(tiny(data__sources=("retrieval",), model__context_length=163))
