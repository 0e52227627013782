"""Time to the first step: the compilation cache, what a start says of itself, and the profiler's trace."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from iha_jax.training import compilation_cache
from iha_jax.training.compilation_cache import Programs, default_folder, use_cache
from iha_jax.training.loop import admit
from iha_jax.training.profile import Profile, profiled_steps
from iha_jax.training.start_up import StartUp
from tests.tiny import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture
def chosen(monkeypatch):
    """What `use_cache` sets, instead of setting it; nothing is set to begin with."""
    values = {"jax_compilation_cache_dir": None}
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.setattr(compilation_cache.jax.config, "update", values.__setitem__)
    monkeypatch.setattr(type(jax.config), "values", values)
    return values


DIR, LEAST, OF_XLA = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)


def test_the_cache_is_beside_the_run_unless_told_otherwise(chosen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_cache("", "runs/a")
    assert chosen == {DIR: str(tmp_path / "runs/.jax_cache"), LEAST: 0.0}
    use_cache("", "runs/b")  # what jax was told is left alone
    assert chosen[DIR] == str(tmp_path / "runs/.jax_cache")
    use_cache(str(tmp_path / "mine"), "runs/a")
    assert chosen[DIR] == str(tmp_path / "mine")
    use_cache("off", "runs/a")
    assert chosen["jax_enable_compilation_cache"] is False
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--compilation_cache=file: is a file"):
        use_cache("file", "runs/a")


def test_a_folder_that_cannot_be_written_has_its_cache_in_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("IHA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert str(default_folder(str(tmp_path / "new/run"))) == str(tmp_path / "cache/.jax_cache")


def test_a_bucket_keeps_the_cache_but_not_the_one_of_xla(chosen, tmp_path, monkeypatch):
    from tests.bucket import use_bucket

    use_bucket(tmp_path, monkeypatch)
    use_cache("", "gs://mine/runs/a")
    assert chosen == {DIR: "gs://mine/runs/.jax_cache", OF_XLA: "none"}
    assert str(default_folder("gs://mine")) == "gs://mine/.jax_cache"


def test_on_a_cpu_an_older_jax_keeps_no_cache_by_itself(chosen, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 1))
    use_cache("", str(tmp_path / "run"))
    assert chosen == {DIR: None}
    use_cache(str(tmp_path / "mine"), str(tmp_path / "run"))
    assert chosen[DIR] == str(tmp_path / "mine")


def test_a_second_start_finds_its_programs(tmp_path):
    program = f"""
import jax
from iha_jax.training.compilation_cache import Programs, use_cache
use_cache("", {str(tmp_path / "runs/a")!r})
with Programs() as programs:
    jax.jit(lambda x: x * 3 + 1)(2.0)
jax.jit(lambda x: x * 5 + 1)(2.0)
print(programs.looked_for, programs.found)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert not done.stderr
        counts.append([int(count) for count in done.stdout.split()])
    assert counts[0][0] == counts[1][0] == counts[1][1] > 0
    assert counts[0][1] == 0
    assert (tmp_path / "runs/.jax_cache").is_dir()


def test_phases_of_a_start_add_up(monkeypatch):
    times = iter([1.0, 3.0, 3.5, 7.5])
    monkeypatch.setattr("iha_jax.training.start_up.time.perf_counter", lambda: next(times))
    start = StartUp()
    for phase in ("imports", "state", "compile"):
        start.mark(phase)
    with Programs() as programs:
        pass
    assert start.describe(programs) == (
        "first step after 6.5 s (imports 2.0, state 0.5, compile 4.0); no compilation cache"
    )
    assert start.facts(programs)["start_seconds"] == {"imports": 2.0, "state": 0.5, "compile": 4.0}


@pytest.mark.parametrize("bad", ["3", "3:", ":3", "0:3", "4:3", "2:7", "a:b", "-1:3", "1:2:3", "1.5:2"])
def test_steps_to_profile_that_are_none_are_refused(bad, tmp_path):
    with pytest.raises(ValueError, match=rf"--profile_steps={bad}: expected START:STOP .* <= 6"):
        admit(tiny(), str(tmp_path / "run"), bad)
    assert not (tmp_path / "run").exists()


def steps_of(folder):
    """The steps that a trace holds by their numbers, as its viewer reads them."""
    (file,) = Path(folder).glob("plugins/profile/*/*.xplane.pb")
    events = (
        e for plane in jax.profiler.ProfileData.from_file(str(file)).planes for x in plane.lines for e in x.events
    )
    return sorted(dict(event.stats)["step_num"] for event in events if event.name.startswith("train"))


def profiled(folder, steps, through):
    function = jax.jit(lambda x: x @ x)
    with Profile(folder, steps) as profile:
        for step in through:
            with profile.step(step):
                result = function(jnp.ones((7, 7)))
            if profile.ends_at(step):
                result.block_until_ready()
                assert str(folder) in profile.close()


@pytest.mark.parametrize(
    ("through", "expected"),
    [(range(1, 6), [2, 3, 4]), (range(3, 6), [3, 4]), (range(1, 3), [2])],
    ids=["all", "resumed within", "preempted within"],
)
def test_a_trace_holds_the_steps_asked_for(tmp_path, through, expected):
    from etils import epath

    profiled(epath.Path(tmp_path), profiled_steps("2:4", 6), through)
    assert steps_of(tmp_path / "profile") == expected
    assert len(list((tmp_path / "profile").rglob("*.trace.json.gz"))) == 1  # Perfetto's


def test_no_trace_is_no_work(tmp_path, monkeypatch):
    from etils import epath

    monkeypatch.setattr(jax.profiler, "start_trace", None)
    profile = Profile(epath.Path(tmp_path), profiled_steps("", 6))
    assert isinstance(profile.step(3), contextlib.nullcontext)
    profiled(epath.Path(tmp_path), profiled_steps("2:4", 6), range(5, 7))
    assert not list(tmp_path.iterdir())
