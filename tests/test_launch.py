"""`launch/`: the commands of a dry run, and the scripts with stand-ins for gcloud, xpk, srun and scontrol."""

import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
TRAIN = ["--config=configs/paper_2p4b.py:iha", "--workdir=gs://bucket/my runs"]
SETTINGS = ("DRY_RUN", "MULTISLICE", "IMAGE", "SLICES", "RESTARTS", "GRACE", "PYTHON")  # what scripts read
XPK = dict(PROJECT="p", ZONE="z", CLUSTER="c", TPU_TYPE="v5p-256")


def launch(script, *arguments, **environment):
    command = ["bash", str(LAUNCH / script), *arguments]
    theirs = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k not in SETTINGS}
    return subprocess.run(command, cwd=ROOT, env=theirs | environment, capture_output=True, text=True, timeout=60)


def commands(script, *arguments, **environment):
    """The commands of a dry run, each as its words."""
    done = launch(script, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def flags(words):
    return dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a program on the PATH: `stand_in(name, bash text)`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name, text, place=folder):
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (place / name).chmod(0o755)

    return make


# --- As text.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_are_clean(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here: pip install -e '.[test]' brings it")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.suffix == ".sh"], ids=lambda path: path.name)
def test_without_arguments_a_script_says_how_it_is_used(script):
    done = launch(script.name, **XPK)
    assert done.returncode == 2
    assert f"launch/{script.name} [--dry_run]" in done.stderr


# --- Cloud TPU over ssh.


def test_tpu_vm_installs_the_last_commit_on_all_hosts():
    bundle, copy, install = commands("tpu_vm.sh", "--dry_run", "install", "pod", "us-east5-a", TMPDIR="/t")
    assert bundle == ["git", "bundle", "create", "-q", "/t/iha_jax.bundle", "HEAD"]
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert copy[5:] == ["/t/iha_jax.bundle", "pod:", "--zone=us-east5-a", "--worker=all"]
    assert install[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert "--worker=all" in install
    assert flags(install)["--command"].endswith("pip install -q --python=.venv -e '.[tpu,gcs]'")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_tpu_vm_install_twice_leaves_the_commit_with_its_revision(stand_in, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    shell = 'for a; do case $a in --command=*) bash -c "${a#--command=}";; esac; done'
    stand_in("gcloud", f'[[ $4 == scp ]] && cp "$5" {home}; cd {home}\n{shell}')
    stand_in("python3", f'echo "$@" >>{tmp_path / "installs"}')
    for _ in range(2):
        done = launch("tpu_vm.sh", "install", "pod", "z", TMPDIR=str(tmp_path))
        assert done.returncode == 0, done.stderr
    heads = [subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=place) for place in (ROOT, home / "iha_jax")]
    assert heads[0] == heads[1]
    assert (home / "iha_jax" / "train.py").is_file()
    assert len((tmp_path / "installs").read_text().splitlines()) == 6


def test_tpu_vm_on_several_slices_and_one_log():
    (stop,) = commands("tpu_vm.sh", "--dry_run", "stop", "pod", "z", MULTISLICE="1")
    assert stop[:5] == ["gcloud", "compute", "tpus", "queued-resources", "ssh"]
    assert {"--node=all", "--worker=all"} <= set(stop)
    (watch,) = commands("tpu_vm.sh", "--dry_run", "watch", "pod", "z")
    assert "--worker=0" in watch
    assert launch("tpu_vm.sh", "--dry_run", "stat", "pod", "z").returncode == 2


def test_tpu_vm_starts_detached_stops_and_keeps_the_exit_code(stand_in, tmp_path):
    """gcloud's stand-in runs the shell command here, and train.py's writes its arguments and waits to be stopped."""
    home = tmp_path / "home"
    run = 'trap "kill \\$!; exit 75" TERM\nprintf "%s\\n" "$@" >arguments\necho started\nsleep 60 & wait'
    stand_in("python", run, home / "iha_jax" / ".venv" / "bin")
    stand_in("gcloud", f'cd {home}\nfor a; do case $a in --command=*) bash -c "${{a#--command=}}";; esac; done')
    assert launch("tpu_vm.sh", "start", "pod", "z", *TRAIN).returncode == 0
    wait_for(home / "iha_jax" / "arguments")
    assert (home / "iha_jax" / "arguments").read_text().splitlines() == ["train.py", *TRAIN]
    assert "running\nstarted" in launch("tpu_vm.sh", "status", "pod", "z").stdout
    assert launch("tpu_vm.sh", "stop", "pod", "z").returncode == 0
    wait_for(home / "iha_jax" / "exit_code")
    assert "\n75\n" in launch("tpu_vm.sh", "status", "pod", "z").stdout


def wait_for(path):
    end = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.02)


# --- GKE.


def test_gke_job_restarts_on_75_and_keeps_the_arguments_whole(stand_in):
    (words,) = commands("gke_xpk.sh", "--dry_run", "iha", *TRAIN, **XPK, SLICES="2")
    assert words[:3] == ["xpk", "workload", "create"]
    found = flags(words)
    assert {found[f"--{key}"] for key in ("project", "zone", "cluster", "tpu-type")} == set(XPK.values())
    assert (found["--workload"], found["--num-slices"], found["--restart-on-exit-codes"]) == ("iha", "2", "75")
    assert int(found["--max-restarts"]) > 0
    assert int(found["--termination-grace-period-seconds"]) >= 120
    for name in ("pip", "python"):
        stand_in(name, f'printf "%s\\n" {name} "$@"')
    done = subprocess.run(["bash", "-c", found["--command"]], capture_output=True, text=True)
    lines = ["pip", "install", "-q", "-e", ".[tpu,gcs]", "python", "train.py", *TRAIN]
    assert done.stdout.splitlines() == lines


def test_gke_job_with_an_image_of_your_own_and_what_it_lacks():
    (words,) = commands("gke_xpk.sh", "--dry_run", "iha", *TRAIN, **XPK, IMAGE="gcr.io/p/iha")
    assert flags(words)["--docker-image"] == "gcr.io/p/iha"
    assert "--base-docker-image" not in flags(words)
    assert flags(words)["--command"].startswith("cd /app && exec python train.py ")
    done = launch("gke_xpk.sh", "--dry_run", "iha", *TRAIN, **(XPK | {"CLUSTER": ""}))
    assert done.returncode != 0
    assert "CLUSTER" in done.stderr


# --- SLURM.


def directives(script):
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", (LAUNCH / script).read_text(), re.MULTILINE))


def test_slurm_starts_one_process_a_node():
    (words,) = commands("slurm.sbatch", *TRAIN, DRY_RUN="1", SLURM_CPUS_PER_TASK="32")
    assert words[:2] == ["srun", "--cpus-per-task=32"]
    assert words[-4:] == [".venv/bin/python", "train.py", *TRAIN]
    assert directives("slurm.sbatch")["ntasks-per-node"] == "1"
    for script in ("slurm.sbatch", "sweep.sbatch"):
        assert "#SBATCH --requeue\n" in (LAUNCH / script).read_text()
        assert directives(script)["signal"].startswith("TERM@")  # to the steps; B:TERM would reach the script alone


def test_slurm_sweep_runs_the_point_of_its_task():
    sweep = ["--config=configs/learning_rate_sweep.py", "--workdir=/shared/my runs"]
    (words,) = commands("sweep.sbatch", *sweep, DRY_RUN="1", SLURM_ARRAY_TASK_ID="3")
    assert words[-6:] == [".venv/bin/python", "-m", "iha_jax.sweep", *sweep, "--index=3"]
    done = launch("sweep.sbatch", *sweep, DRY_RUN="1")
    assert done.returncode != 0
    assert "sbatch --array" in done.stderr


@pytest.mark.parametrize("script", ["slurm.sbatch", "sweep.sbatch"])
@pytest.mark.parametrize("code", [0, 75, 2])
def test_slurm_requeues_after_75_alone(stand_in, tmp_path, script, code):
    stand_in("srun", f'kill -TERM "$PPID"; exit {code}')  # as where SLURM signals the batch script too
    stand_in("scontrol", f'echo "$@" >{tmp_path / "requeued"}')
    done = launch(script, *TRAIN, SLURM_JOB_ID="17", SLURM_ARRAY_TASK_ID="0")
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == (code == 75)
    if code == 75:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"


# --- SkyPilot.


def test_skypilot_runs_one_process_a_node_and_recovers_from_75():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    known = {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    assert set(task) == known
    assert task["num_nodes"] > 1
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert task["resources"]["use_spot"] is True
    assert task["envs"]["WORKDIR"] is None  # SkyPilot refuses to start without it
    assert (ROOT / task["envs"]["CONFIG"].partition(":")[0]).is_file()
    places = dict(SKYPILOT_NODE_IPS="10.0.0.4\n10.0.0.7", SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1")
    given = dict(WORKDIR="gs://b/x", DRY_RUN="1", FLAGS="--config.seed=3 --config.training.steps=5")
    variables = os.environ | task["envs"] | places | given
    done = subprocess.run(["bash", "-c", task["run"]], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = "exec .venv/bin/python train.py --config=configs/paper_2p4b.py:iha --workdir=gs://b/x "
    expected += "--config.seed=3 --config.training.steps=5 "
    expected += "--coordinator_address=10.0.0.4:8476 --process_count=2 --process_index=1\n"
    assert done.stdout == expected
    assert subprocess.run(["bash", "-n", "-c", task["setup"]]).returncode == 0
