"""Everything a user can get wrong, as typed: refused before anything is compiled, by name, with nothing written."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from iha_jax.config_file import load_config
from iha_jax.training.loop import admit, train
from tests.several import ROOT, prepare_texts, small_command

BAD = [  # what is added to a good command, and what the refusal says
    # --- Names and values of fields.
    (
        "--config.model.widht=64",
        "config.model has no key 'widht'; did you mean config.model.width?",
    ),
    ("--config.modle.width=64", "config has no key 'modle'; did you mean config.model?"),
    ("--config.model=3", "config.model is a section with keys causal, compute_dtype"),
    ("--config.seed", "--config.seed: expected --config.section.key=value"),
    ("--config.seed=-1", "config.seed = -1: expected 0 or more"),
    ("--config.seed=1.5", "config.seed = 1.5: expected 0 or more, got float"),
    ("--config.seed=none", "config.seed = 'none'"),
    ("--config.model.width=True", "config.model.width = True: expected a number above 0, got bool"),
    ("--config.model.width=nan", "config.model.width = nan"),
    ("--config.model.num_layers=0", "config.model.num_layers = 0"),
    (
        "--config.model.num_heads=5",
        "config.model.num_heads = 5: does not divide config.model.width = 24; choose one of 1, 2, 3",
    ),
    ("--config.model.head_width=3", "config.model.head_width = 3: RoPE rotates pairs, so it must be even"),
    (
        "--config.model.num_kv_heads=4",
        "config.model.num_kv_heads = 4: does not divide config.model.num_heads = 6; choose one of",
    ),
    ("--config.model.mlp=swiglue", "did you mean 'swiglu'?"),
    ("--config.model.layer_pattern=mha,ihalocal", "config.model.layer_pattern[1] = 'ihalocal'"),
    ("--config.model.implementation=cudn", "did you mean 'cudnn'?"),
    (
        "--config.model.implementation=splash",
        "config.model.implementation = 'splash': runs on tpu, and this is cpu; expected 'auto'",
    ),
    ("--config.model.compute_dtype=float8", "config.model.compute_dtype = 'float8'"),
    ("--config.model.causal=False", "config.model.causal = False: each token would see the one it must predict"),
    ("--config.model.vocab_size=100", "config.model.vocab_size = 100: smaller than the 257 ids"),
    ("--config.optimizer.learning_rate=nan", "config.optimizer.learning_rate = nan"),
    ("--config.optimizer.learning_rate=-1", "config.optimizer.learning_rate = -1"),
    ("--config.optimizer.warmup_steps=9", "config.optimizer.warmup_steps = 9"),
    ("--config.training.steps=none", "config.training.steps = 'none'"),
    ("--config.training.steps=1e3", "config.training.steps = 1000.0"),
    ("--config.training.batch_size=0", "config.training.batch_size = 0"),
    ("--config.training.accumulation=3", "config.training.accumulation = 3"),
    ("--config.training.loss_chunk=5", "config.training.loss_chunk = 5"),
    ("--config.training.keep_checkpoints=0", "config.training.keep_checkpoints = 0"),
    ("--config.training.max_skipped_steps=0", "config.training.max_skipped_steps = 0"),
    ("--config.training.watchdog_seconds=-1", "config.training.watchdog_seconds = -1"),
    ("--config.training.spike_threshold=inf", "config.training.spike_threshold = inf"),
    ("--config.training.init_from=/no/such/run", "/no/such/run: is not a run directory (no config.json)"),
    ("--config.training.init_from_state=True", "config.training.init_from_state = True: set config.training.init_from"),
    # --- Devices.
    ("--config.mesh.fsdp=3", "their product 3 must divide the 1 devices"),
    ("--config.mesh.data=0", "config.mesh.data = 0"),
    ("--config.mesh.tensor=-1", "config.mesh: data and tensor are both -1"),
    # --- Data and tokenizers.
    ("--config.data.sources=/no/such/set", "data source '/no/such/set' does not exist. Prepare text files with"),
    ("--config.data.sources={folder}/text", "holds no TFDS data set (no dataset_info.json)"),
    ("--config.data.sources=", "config.data.sources = ()"),
    ("--config.data.sources=chat:/no/such.jsonl", "no file /no/such.jsonl; expected a .jsonl file, or a folder"),
    (
        "--config.data.sources=retrieval --config.data.document_attention=False",
        "config.data.document_attention = False",
    ),
    ("--config.data.sources=retrieval:one", "expected 'retrieval', or 'retrieval:SEED' with a whole number"),
    ("--config.data.train_split=trian", "has no split 'trian'"),
    ("--config.data.text_feature=body", "has no feature 'body'"),
    ("--config.data.weights=1,2", "one weight for each of the 1"),
    ("--config.data.tokenizer=byte", "tokenizer = 'byte': expected 'bytes', 'hf:/path"),
    ("--config.data.tokenizer=hf:/no/such.json", "no file /no/such.json"),
    ("--config.data.tokenizer=hf:{folder}/text/document_00.txt", "cannot be read as a tokenizer.json"),
    ("--config.data.workers=-1", "config.data.workers = -1"),
    # --- Run directories: files, strangers, and runs that were started otherwise or are hostile.
    ("--workdir={folder}/text/document_00.txt", "is a file; expected a directory"),
    ("--workdir={folder}/text/document_00.txt/run", "is a file, so nothing can be made under it"),
    ("--workdir={folder}/text", "is not empty and is no run (no config.json, but document_00.txt"),
    ("--workdir={folder}/run --config.seed=1", "seed: 0 in the run, 1 now"),
    ("--workdir={folder}/run --config.training.batch_size=16", "training.batch_size: 8 in the run, 16 now"),
    ("--workdir={folder}/run --config.model.mlp_width=48", "model.mlp_width: 32 in the run, 48 now"),
    ("--workdir={folder}/run --config.data.tokenizer=hf:{folder}/t.json", "data.tokenizer: 'bytes' in the run"),
    ("--workdir={folder}/other_corpus", "was started on other data:\n  - corpus_digest: 0123 in the run"),
    ("--workdir={folder}/other_tokenizer", "was started on other data:\n  - tokenizer_digest: 0123 in the run"),
    ("--workdir={folder}/list", "config.json: holds no JSON object"),
    ("--workdir={folder}/torn", "config.json: not JSON"),
    ("--workdir={folder}/deep", "config.json: not JSON"),
    ("--workdir={folder}/huge", "config.json: larger than"),
    ("--workdir={folder}/binary", "config.json: not JSON"),
    ("--workdir={folder}/foreign", "no such key"),
    ("--workdir={folder}/provenance", "provenance.json: holds no JSON object"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared data set, a finished run, and runs that someone has spoiled."""
    folder = tmp_path_factory.mktemp("data")
    data = prepare_texts(folder)
    train(admitted(small_command(folder / "run", data, steps=4, eval_every=4)))
    config = json.loads((folder / "run" / "config.json").read_text())
    provenance = json.loads((folder / "run" / "provenance.json").read_text())
    spoiled = {
        "list": ("config.json", b"[1, 2]"),
        "torn": ("config.json", json.dumps(config).encode()[:-9]),
        "deep": ("config.json", b"[" * 200_000),
        "huge": ("config.json", b" " * (2**26 + 1)),
        "binary": ("config.json", bytes(range(256))),
        "foreign": ("config.json", json.dumps(config | {"run": "rm -rf"}).encode()),
        "provenance": ("provenance.json", b"[]"),
        "other_corpus": ("provenance.json", json.dumps(provenance | {"corpus_digest": "0123"}).encode()),
        "other_tokenizer": ("provenance.json", json.dumps(provenance | {"tokenizer_digest": "0123"}).encode()),
    }
    for name, (file, content) in spoiled.items():
        shutil.copytree(folder / "run", folder / name)
        (folder / name / file).write_bytes(content)
    return folder


def admitted(command):
    """What train.py does with these arguments before anything is compiled."""
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in command if argument.startswith("--w"))
    overrides = [argument.removeprefix("--config.") for argument in command if argument.startswith("--config.")]
    return admit(load_config("configs/base.py", overrides), flags["workdir"])


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "cache" not in path.parts}


@pytest.mark.parametrize(("added", "message"), BAD, ids=[added.replace("{folder}", "") for added, _ in BAD])
def test_bad_input_is_refused_by_name_and_nothing_is_written(folder, added, message):
    before = contents(folder)
    command = small_command(folder / "new", folder / "prepared", steps=4, eval_every=4)
    with pytest.raises(ValueError) as error:
        admitted(command + added.format(folder=folder).split())
    assert message in str(error.value)
    assert contents(folder) == before


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(folder):
    """Where the config does not tell: the checkpoints of another run were copied here."""
    workdir = shutil.copytree(folder / "run", folder / "other_model")
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["mlp_width"] = 29
    (workdir / "config.json").write_text(json.dumps(config))
    command = small_command(workdir, folder / "prepared", steps=4, eval_every=4, flags=["--config.model.mlp_width=29"])
    noted = ("provenance.json", "wall_time.json")  # that there was a start, and how long it took
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name not in noted}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert f"refused: checkpoint {workdir / 'checkpoints' / '4'} does not fit:" in done.stderr
    assert "  - parameters/groups/block_0/mlp/up: shape (1, 24, 32) in the checkpoint, (1, 24, 29) exp" in done.stderr
    assert "Traceback" not in done.stderr
    for path, content in before.items():
        assert path.read_bytes() == content


def test_a_refusal_takes_seconds_after_the_imports(folder):
    """As a command, with jax's imports timed apart: they are the most of it."""

    def seconds(arguments):
        began = time.monotonic()
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return time.monotonic() - began, done

    imports, done = seconds(["-c", "import iha_jax.training.loop"])
    assert done.returncode == 0
    command = small_command(folder / "run", folder / "prepared", steps=4, eval_every=4)
    whole, done = seconds([*command, "--config.training.batch_size=16"])
    assert done.returncode == 2
    assert "training.batch_size: 8 in the run, 16 now" in done.stderr
    print(f"imports {imports:.1f} s, refused after {whole:.1f} s")
    assert whole - imports < 5
