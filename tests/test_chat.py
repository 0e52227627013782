"""Fine-tuning on conversations: what counts in the loss, rows of whole ones, resuming, starting states, bad input."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iha_jax.data import arithmetic
from iha_jax.data.batches import example
from iha_jax.data.chat import END_OF_TURN, conversation_text, prompt_text, read_conversation
from iha_jax.data.corpus import open_corpus
from iha_jax.data.rows import open_rows
from iha_jax.data.tokenizers import load_tokenizer
from iha_jax.model import bind, initialize
from iha_jax.training.loop import admit, train
from iha_jax.training.step import make_eval_step
from tests.test_training import losses, rows, train_and_stop
from tests.tiny import tiny
from tests.tiny_tokenizers import huggingface

TURNS = [("system", "s"), ("user", "hi"), ("assistant", "yo é"), ("user", "?"), ("assistant", "no")]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]
TEXT = (
    "<|system|>\ns<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\nyo é<|end|>\n"
    "<|user|>\n?<|end|>\n<|assistant|>\nno<|end|>"
)


def write(path, conversations):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def folder(tmp_path):
    """Conversations of 53 to 76 bytes: with N = 83 one to a row, with N = 211 three."""
    for name, count in (("train", 29), ("validation", 7)):
        conversations = [turns("q" * (3 + i % 13), "a" * (1 + i % 11)) for i in range(count)]
        write(tmp_path / "chat" / f"{name}.jsonl", conversations)
    return tmp_path / "chat"


def chat_rows(path, split="train", N=83, tokenizer="bytes", **options):
    cache = str(Path(path).parent / "cache")
    options = dict(cache_dir=cache, tokenizer=load_tokenizer(tokenizer), context_length=N) | options
    return open_rows(source=f"chat:{path}", split=split, **options)


# --- The text of a conversation, and what counts.


def test_a_prompt_is_the_beginning_of_what_is_trained():
    pieces = conversation_text(MESSAGES)
    assert "".join(text for text, _ in pieces) == TEXT
    assert [text for text, mine in pieces if mine] == ["yo é<|end|>", "no<|end|>"]
    for number in (2, 4):
        assert TEXT.startswith(prompt_text(MESSAGES[:number]) + MESSAGES[number]["content"] + END_OF_TURN)


def test_the_loss_is_on_the_assistants_tokens_and_on_no_others(tmp_path):
    write(tmp_path / "one" / "train.jsonl", [MESSAGES])
    row = example(chat_rows(tmp_path / "one", N=150)[0])
    raw = [256, *TEXT.encode()]
    np.testing.assert_array_equal(row["inputs"][: len(raw)], raw)
    counted = row["targets"][row["loss_mask"] > 0]
    assert bytes(counted.tolist()).decode() == "yo é<|end|>no<|end|>"
    first = 1 + TEXT.index("yo")
    assert list(row["loss_mask"][first - 2 : first]) == [0, 1]  # the line break predicts the answer


def test_both_layouts_are_the_same_conversation():
    layout = {"system": "s", "conversations": [{"from": r, "value": t} for r, t in TURNS[1:]]}
    other = {"system": "s", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo é"}]}
    assert read_conversation(json.dumps(layout)) == MESSAGES
    assert read_conversation(json.dumps(other)) == MESSAGES[:3]
    assert read_conversation(json.dumps({"messages": MESSAGES})) == MESSAGES


def test_a_tokenizer_of_words_counts_the_same_text(tmp_path):
    spec = huggingface("byte-level", tmp_path)
    tokenizer = load_tokenizer(spec)
    write(tmp_path / "one" / "train.jsonl", [MESSAGES])
    row = example(chat_rows(tmp_path / "one", N=150, tokenizer=spec)[0])
    assert tokenizer.decode(row["targets"][row["loss_mask"] > 0]) == "yo é<|end|>no<|end|>"


# --- Packing.


def test_rows_hold_whole_conversations_each_once(folder):
    found = chat_rows(folder, N=211)
    seen = []
    for i in range(len(found)):
        row = found[i]
        for segment in range(1, row["segment_ids"].max() + 1):
            tokens = row["tokens"][row["segment_ids"] == segment]
            assert tokens[0] == 256
            seen.append(bytes(tokens[1:].tolist()).decode())
    expected = [prompt_text(turns("q" * (3 + i % 13), "")[:1]) + "a" * (1 + i % 11) + END_OF_TURN for i in range(29)]
    assert sorted(seen) == sorted(expected)
    assert len(found) < 12  # 29 of about 65 tokens, three to a row of 212
    assert (found.num_documents, found.truncated, found.left_out) == (29, 0, 0)


def test_a_neighbor_in_the_row_changes_nothing(tmp_path):
    """Hidden states and loss gradients of one conversation, alone in its row and behind another."""
    config = tiny(model__context_length=150, model__num_layers=1, model__layer_pattern=("mha",))
    both = [turns("first?", "one"), turns("second?", "two")]
    for name, conversations in (("both", both), ("alone", both[1:])):
        write(tmp_path / name / "train.jsonl", conversations)
    batches = {
        name: {key: x[None] for key, x in example(chat_rows(tmp_path / name, N=150)[0]).items()}
        for name in ("both", "alone")
    }
    parameters = initialize(config.model, jax.random.key(0))
    step = make_eval_step(config)
    second = batches["both"]["segment_ids"] == 2
    only_second = batches["both"] | {"loss_mask": batches["both"]["loss_mask"] * second}
    lengths = jnp.ones(257, jnp.int32)
    gradient = jax.jit(jax.grad(lambda p, batch: step(p, batch, lengths)["nll"].sum()))
    gradients = [gradient(parameters, batch) for batch in (only_second, batches["alone"])]
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1.0, float(jnp.abs(other).max())))
    first = batches["both"]["inputs"].copy()
    first[(batches["both"]["segment_ids"] == 1)] = 65
    model = jax.jit(lambda x: bind(config.model, parameters).hidden(x, batches["both"]["segment_ids"]))
    hidden = [model(x) for x in (batches["both"]["inputs"], first)]
    np.testing.assert_array_equal(hidden[0][second], hidden[1][second])


def test_what_is_too_long_is_cut_counted_and_said(tmp_path, capsys):
    # A row has 84 tokens: the second is longer by some, and of the third's answer nothing is left.
    long = [turns("q", "a"), turns("q", "a" * 70), turns("q" * 60, "a"), turns("q", "a")]
    write(tmp_path / "long" / "train.jsonl", long)
    found = chat_rows(tmp_path / "long", N=83)
    length = len(f"<|user|>\nq<|end|>\n<|assistant|>\n{'a' * 70}<|end|>") + 1
    assert (found.num_documents, found.left_out, found.truncated) == (3, 1, 1)
    assert found.truncated_tokens == length - 84
    said = capsys.readouterr().err
    assert "left out 1 of 4 documents: longer than a row before any answer" in said
    assert f"1 of 4 conversations are longer than 84 tokens: {length - 84} tokens at their ends" in said
    counted = sorted(int(example(found[i])["loss_mask"].sum()) for i in range(len(found)))
    assert counted == [16, 84 - len("_<|user|>\nq<|end|>\n<|assistant|>\n")]
    config = tiny(data__sources=(f"chat:{tmp_path}/long",), data__cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"split 'train': in 24 tokens no answer begins"):
        open_corpus(config)


# --- Runs.


def settings(folder, **changes):
    data = dict(data__sources=(f"chat:{folder}",), data__cache_dir=str(folder.parent / "cache"))
    return tiny(**(data | dict(model__context_length=83, model__num_layers=2, model__layer_pattern=("mha",)) | changes))


def test_a_run_on_conversations_resumes_bit_for_bit(folder, tmp_path):
    config = settings(folder)
    assert train(admit(config, str(tmp_path / "whole"))) == 0
    assert train_and_stop(config, tmp_path / "stopped", 4) == 75
    assert train(admit(config, str(tmp_path / "stopped"))) == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    noted = json.loads((tmp_path / "whole" / "provenance.json").read_text())["runs"][0]["data"]
    assert (noted["num_documents"], noted["truncated"]) == (29, 0)
    lines = (folder / "train.jsonl").read_text().replace("qqqqq", "qqqzq")
    (folder / "train.jsonl").write_text(lines)
    with pytest.raises(ValueError, match="was started on other data:\n  - corpus_digest"):
        admit(config, str(tmp_path / "whole"))


def test_the_whole_state_of_another_run_goes_on_as_that_run(folder, tmp_path):
    """Six steps, and three steps whose state another run takes over: the same losses, tokens and FLOPs."""
    config = settings(folder)
    train(admit(config, str(tmp_path / "whole")))
    start = dict(training__init_from_step=3, training__init_from_state=True)
    start["training__init_from"] = str(tmp_path / "whole")
    train(admit(settings(folder, **start), str(tmp_path / "taken")))
    kept = [{n: r[n] for n in ("step", "loss", "tokens", "flops")} for r in rows(tmp_path / "whole", "train")[3:]]
    assert [{n: r[n] for n in kept[0]} for r in rows(tmp_path / "taken", "train")] == kept
    with pytest.raises(ValueError, match=r"training\.steps = 6: .* is at step 6 already"):
        admit(settings(folder, **start | dict(training__init_from_step=0)), str(tmp_path / "no"))
    with pytest.raises(ValueError, match=r"(?s)does not fit.*parameters/.*mlp/up: .* in the source"):
        admit(settings(folder, **start, model__mlp_width=31), str(tmp_path / "no"))
    with pytest.raises(ValueError, match="init_from_state = True: set config"):
        settings(folder, training__init_from_state=True)
    assert not (tmp_path / "no").exists()


def test_a_longer_context_starts_from_a_shorter_run(folder, tmp_path):
    """The window kept, and derived again from the new context; another RoPE base."""
    small = dict(model__layer_pattern=("iha_local", "mha"), training__steps=4, training__eval_every=6)
    train(admit(settings(folder, **small, model__iha__window=3), str(tmp_path / "short")))
    small |= dict(model__context_length=167, training__init_from=str(tmp_path / "short"), model__rope_theta=50_000.0)
    for name, asked, window in (("kept", 3, 3), ("rederived", 0, 167 // (2 * 3**2))):
        config = settings(folder, **small, model__iha__window=asked)
        assert config.model.iha.window == window
        job = admit(config, str(tmp_path / name))
    train(job)
    assert rows(tmp_path / "rederived", "val")[-1]["step"] == 4


# --- Bad input.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "expected a JSON object, got list"),
        ('{"text": "a"}', "expected a list 'messages', or 'conversations'; its keys: text"),
        ('{"messages": []}', "no messages"),
        ('{"messages": [{"role": "user"}]}', "message 1 of 'messages': expected an object with 'role' and 'content'"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "role 'robot'; expected one of system, user, assistant"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "message 1 is of role 'assistant'; expected"),
        ('{"messages": [{"role": "user", "content": " "}]}', "message 1 (user): expected text, got ' '"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1 (user): expected text, got None"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
        ('{"messages": [{"role": "user", "content": "<|end|>"}]}', "contains '<|end|>', which marks turns"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "not valid Unicode"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_number(tmp_path, line, message):
    write(tmp_path / "c" / "validation.jsonl", [turns("q", "a")])
    write(tmp_path / "c" / "train.jsonl", [turns("q", "a")])
    with (tmp_path / "c" / "train.jsonl").open("a") as file:
        file.write(f"\n{line}\n")  # a blank line counts as a line
    with pytest.raises(ValueError) as error:
        chat_rows(tmp_path / "c")
    assert f"{tmp_path}/c/train.jsonl, line 3: " in str(error.value)
    assert message in str(error.value)
    assert not list((tmp_path / "cache" / "rows").iterdir())


def test_missing_files_and_empty_splits_are_named(tmp_path):
    write(tmp_path / "one.jsonl", [turns("q", "a")])  # by its hash a training conversation or a validation one
    message = r"split '(train|validation)': holds no conversation; use a folder with train.jsonl"
    with pytest.raises(ValueError, match=message):
        [chat_rows(tmp_path / "one.jsonl", split=split) for split in ("train", "validation")]
    with pytest.raises(ValueError, match=r"no file .*none.jsonl; expected a .jsonl file, or a folder"):
        chat_rows(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"no file .*/test.jsonl; there are one.jsonl"):
        chat_rows(tmp_path, split="test")


def test_a_prompt_that_is_no_prompt_is_refused():
    for messages, message in (
        ([], "no messages"),
        (MESSAGES, "the last message is the assistant's"),
        (MESSAGES[1:2] * 2, "message 2 is of role 'user'; expected 'assistant'"),
    ):
        with pytest.raises(ValueError, match=message):
            prompt_text(messages)


# --- The generated reasoning set.


def test_arithmetic_is_right_and_its_files_share_no_question(tmp_path):
    arithmetic.write(tmp_path, {"train": 400, "validation": 40, "test": 40}, seed=3)
    found = {}
    for file in ("train", "validation", "test"):
        lines = [json.loads(line) for line in (tmp_path / f"{file}.jsonl").read_text().splitlines()]
        if file == "test":
            pairs = [(line["question"], line["answer"]) for line in lines]
        else:
            pairs = [tuple(message["content"] for message in read_conversation(json.dumps(line))) for line in lines]
        found[file] = {question for question, _ in pairs}
        for question, answer in pairs:
            equation, result = answer.split("\n#### ")
            left, right = equation.split(" = ")
            assert eval(left) == int(right) == int(result)
            assert all(number in question for number in left.replace("-", "+").split(" + "))
    assert not found["train"] & (found["test"] | found["validation"])
    assert len(found["test"]) > 10
