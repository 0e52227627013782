"""Small comparisons for tests: a config file of tiny models, and run directories written instead of trained."""

import json
from pathlib import Path

import pytest

from iha_jax.comparison.arms import load_comparison, longer_runs, planned_runs
from iha_jax.config import as_dict

CONFIG = """
from ml_collections import ConfigDict

from configs import base

ARMS = ("mha", "iha", "big")


def get_config(arm="iha"):
    config = base.get_config()
    config.model.update(context_length=23, width=24, num_layers=2, num_heads=6, head_width=4, mlp_width=29)
    config.model.iha.update(pseudo_heads=3, window=3)
    config.model.layer_pattern = ("iha_local", "mha") if arm == "iha" else ("mha",)
    if arm == "big":
        config.model.mlp_width = 61
    config.data.update({data!r})
    config.optimizer.warmup_steps = 2
    config.training.update(steps=4, batch_size=4, log_every=2, eval_every=2, eval_rows=4, eval_batch_size=4)
    config.training.checkpoint_every = 2
    return config


def get_comparison():
    return ConfigDict({comparison!r})
"""


def ends(main, *arguments):
    """The exit code that a command ends with."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def config_file(folder: Path, *, data=None, **comparison) -> str:
    """Writes a comparison's config file: arms mha and iha, two seeds, unless `comparison` says otherwise."""
    values = dict(arms=("mha", "iha"), seeds=2, learning_rates=(), controls=()) | comparison
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(data=data or {}, comparison=values))
    return str(path)


def write_run(workdir, run, config, bits, *, seconds=8.0, steps=None, digest="c1", device="cpu"):
    """A run directory as training leaves it; `bits`: the final bits per byte, None for a run that diverged."""
    folder, last = Path(workdir) / run.folder, config.training.steps if steps is None else steps
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(as_dict(config)))
    starts = [{"device_kind": device, "device_count": 1, "started": "2026-11-24T00:00:00Z"}]
    (folder / "provenance.json").write_text(json.dumps({"runs": starts, "corpus_digest": digest}))
    rows = [
        {"step": last, "split": "train", "loss": 1.0, "seconds": seconds, "tokens_per_second": 92.0 * last / seconds}
    ]
    for step in (0, 2, last):
        value = None if bits is None else bits + (last - step)
        costs = {"tokens": 92.0 * step, "flops": 1e6 * step, "seconds": seconds * step / last}
        loss = {"loss": None if value is None else 0.7 * value, "bits_per_byte": value}
        rows.append({"step": step, "split": "val", **loss, **costs, "peak_memory_bytes": 2**30})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def written(tmp_path, bits, *, only=None, **comparison):
    """A comparison whose runs are all written: `bits(arm, seed, rate)` each. Returns it, its workdir and its runs."""
    comparison = load_comparison(config_file(tmp_path / "files", **comparison))
    runs = planned_runs(comparison, ())
    if "longer" in comparison.controls:
        runs += longer_runs(comparison, runs, 6)
    workdir = tmp_path / "runs"
    for run in runs:
        if only is None or only(run):
            write_run(workdir, run, run.config(), bits(run.arm, run.seed, run.learning_rate))
    return comparison, workdir, planned_runs(comparison, ())
