"""A whole run in a bucket, through the commands, on a Cloud Storage server of this machine."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from tests.comparisons import config_file
from tests.texts import write_texts

ROOT = Path(__file__).parent.parent


class Server:
    """`gs://` of the commands that are started here: gcsfs, TensorStore and google.cloud.storage all talk to it."""

    def __init__(self, address):
        self._address = address
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERSIST"))
        } | {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
            "GOOGLE_CLOUD_PROJECT": "any",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else each bucket is first asked what it is
        }

    def start(self, *arguments):
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=self._environment, stderr=subprocess.PIPE, text=True
        )

    def done(self, *arguments):
        process = self.start(*arguments)
        said = process.communicate()[1]
        assert process.returncode == 0, said
        return said

    def _get(self, path):
        with urllib.request.urlopen(f"{self._address}/storage/v1/b/mine/o{path}") as answer:
            return answer.read()

    def read(self, name):
        """An object's bytes; none where there is no such object."""
        try:
            return self._get(f"/{urllib.parse.quote(name, safe='')}?alt=media")
        except urllib.error.HTTPError:
            return b""

    def names(self, prefix):
        return [item["name"] for item in json.loads(self._get(f"?prefix={prefix}")).get("items", [])]


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    download = emulator.objects.download

    def with_generation(request, response, storage, *arguments):
        """TensorStore knows what it read by a header that the real service sends, and this one does not."""
        download(request, response, storage, *arguments)
        if response.status < 400:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]

    monkeypatch.setattr(emulator.objects, "download", with_generation)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    running = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="mine")
    running.start()
    yield Server(f"http://127.0.0.1:{port}")
    running.stop()


def losses(text):
    return [(row["split"], row["step"], row["loss"]) for row in map(json.loads, text.splitlines())]


@pytest.mark.slow
def test_a_run_killed_resumed_evaluated_and_reported(server, tmp_path):
    """Everything in gs://: data, rows, checkpoints, compilation cache, profile, evaluation, report."""
    write_texts(tmp_path / "in")
    data = dict(sources=("gs://mine/set",), cache_dir="gs://mine/cache")
    config = config_file(tmp_path / "files", data=data, seeds=1, arms=("mha",))
    longer = [f"--config.training.{n}={v}" for n, v in dict(steps=24, log_every=1, checkpoint_every=4).items()]
    train, run = ["train.py", f"--config={config}:mha", *longer], "runs/mha/seed0"
    server.done("-m", "iha_jax.data.prepare", f"--input={tmp_path / 'in'}", "--suffix=.txt", "--output=gs://mine/set")
    server.done(*train, f"--workdir={tmp_path / 'here'}")

    process = server.start(*train, f"--workdir=gs://mine/{run}", "--profile_steps=3:5")
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if server.read(f"{run}/metrics.jsonl").count(b"\n") > 9:
            process.kill()
        time.sleep(0.01)
    said = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, said
    before = server.read(f"{run}/metrics.jsonl")
    said = server.done(*train, f"--workdir=gs://mine/{run}")
    assert "resuming after step" in said
    found = losses(server.read(f"{run}/metrics.jsonl"))
    assert found == losses((tmp_path / "here/metrics.jsonl").read_text())
    assert len(found) > before.count(b"\n")
    assert server.names("runs/mha/.jax_cache/")
    (trace,) = (name for name in server.names(f"{run}/profile/") if name.endswith(".xplane.pb"))
    assert server.read(trace)

    server.done("eval.py", f"--workdir=gs://mine/{run}", "--out=gs://mine/eval.json", "--new_tokens=3")
    result = json.loads(server.read("eval.json"))
    assert result["step"] == 24
    assert result["tasks"]["loss"]["loss"] == found[-1][2]
    server.done("-m", "iha_jax.compare", f"--config={config}", "--workdir=gs://mine/runs", *longer)  # finished: reports
    assert server.read("runs/comparison.png")[:4] == b"\x89PNG"
