"""Checkpoints through Orbax: saved in the background, fingerprinted, compared name by name and bit by bit when read.

A checkpoint is `directory/<step>/` with `state/` (arrays), `metadata/` (JSON: format, fingerprints, what the run wants
to remember, and a digest of it all) and `manifest.json`, written last. Which steps exist is asked of the directory,
never of anyone's memory.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar, cast

import jax
import orbax.checkpoint as ocp
from etils import epath

from iha_jax.data.storage import absolute, is_local, read_json
from iha_jax.parallel.processes import is_first, of_all, of_first
from iha_jax.training.fingerprint import inspect
from iha_jax.training.manifest import FILE as MANIFEST
from iha_jax.training.manifest import damage, write_manifest

T = TypeVar("T")
FORMAT = 2
QUARANTINE = "quarantine"
_FORMAT_1 = frozenset({"tokens", "seconds", "corpus_digest", "tokenizer_digest", "rows_digest"})
SECONDS_TO_WRITE = 600  # of several processes: a save for which one waits longer than this for another has failed
_READ_AT_ONCE = 2**28  # elements of a state read back together when a checkpoint is verified


class CheckpointMismatch(ValueError):  # noqa: N818  a mismatch is what it is
    """A checkpoint does not hold what is asked of it. The message lists every difference by name."""


class CheckpointCorrupt(ValueError):  # noqa: N818  corrupt is what it is
    """A checkpoint is not what was saved, or was never finished. The message says where."""


class StateNotFinite(RuntimeError):  # noqa: N818  it says what the state is
    """A state with NaN or infinity, which is never saved."""


class SaveFailed(RuntimeError):  # noqa: N818  that is what happened
    """A checkpoint could not be written."""


def _named(tree: Any) -> dict[str, Any]:
    """Leaves of any state tree by name, such as "optimizer/1/0/mu/embedding": string keys only, whatever optax uses."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_entry(entry) for entry in path): leaf for path, leaf in flat}


def _entry(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


class Checkpointer:
    """The checkpoints of one run directory. A state is stored as a flat dictionary from names to arrays."""

    def __init__(self, directory: epath.PathLike, *, writable: bool):
        self._directory = absolute(directory)
        self._writable = writable
        self._manager = self._open()
        self._saving: int | None = None

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,  # what is deleted is decided by `saves.py`, from the directory
            cleanup_tmp_directories=self._writable,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(timeout_secs=SECONDS_TO_WRITE),
            create=self._writable,
            save_root_metadata=False,  # there is none, and Orbax would wait for all processes to not write it
        )
        return ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def path(self, step: int) -> epath.Path:
        return self._directory / str(step)

    def steps(self) -> list[int]:
        """The finished steps, as the directory lists them; the one being saved is not among them before `confirm`. In a
        bucket an unfinished one has its final name already."""
        if not self._directory.exists():
            return []
        found = [path for path in self._directory.iterdir() if path.name.isdigit() and path.name != str(self._saving)]
        return sorted(int(path.name) for path in found if is_local(path) or ocp.utils.is_checkpoint_finalized(path))

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def common_steps(self) -> list[int]:
        """The steps as process 0 finds them. Every process calls this, and must find the newest of them too.

        Raises:
          ValueError: in a process that does not: its directory is another one.
        """
        steps = of_first(self.steps())
        if steps:
            self._check_step(steps[-1])
        return steps

    def save(self, step: int, state: Any, *, metadata: Mapping[str, Any]) -> None:
        """Starts saving `state` and a JSON of `metadata`; returns once the arrays are copied.

        Raises:
          StateNotFinite: naming the arrays that hold NaN or infinity; nothing is written.
          SaveFailed: when it is known already that this cannot be written.
        """
        named = _named(state)
        prints, not_finite = inspect(named)
        if not_finite:
            raise StateNotFinite(f"step {step} has NaN or infinity in {', '.join(not_finite)}: not saved")
        content = {"format": FORMAT, "fingerprints": prints, "run": dict(metadata)}
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(named), metadata=ocp.args.JsonSave(content | {"sha256": _digest(content)})
        )
        self._saving = step
        problem = None
        try:
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:
            problem = _cause(error)
        self._give_up_if(problem)

    def saving(self) -> bool:
        """Whether a save has begun and its writing goes on, in any process."""
        return self._saving is not None and any(of_all(self._manager.is_saving_in_progress()))

    def confirm(self) -> int | None:
        """Waits for the save that has begun and finishes it with its manifest. Returns its step, or None.

        Raises:
          SaveFailed: nothing of the failed save is left, and the next one starts afresh.
        """
        step, problem = self._saving, None
        if step is None:
            return None
        try:
            self._manager.wait_until_finished()
            if is_first():
                write_manifest(self.path(step))
        except Exception as error:
            problem = _cause(error)
        self._give_up_if(problem)
        self._saving = None
        return step

    def _give_up_if(self, problem: str | None) -> None:
        """After a failure in any process the managers' memory is wrong (they list steps that are not there): new ones
        are opened, and SaveFailed is raised in all processes."""
        problems = list(dict.fromkeys(text for text in of_all(problem) if text))
        if not problems:
            return
        step, self._saving = self._saving, None
        try:
            free = f"{shutil.disk_usage(self._directory).free / 2**20:,.0f} MiB are free there"
        except OSError:
            free = "its free space is unknown"
        if is_first() and step is not None and self.path(step).exists():
            self.path(step).rmtree()
        of_first(None)  # nobody lists the steps while one is being deleted
        self._manager.close()
        self._manager = self._open()  # removes what the failed save has left
        raise SaveFailed(f"saving step {step} into {self._directory} failed ({free}): {'; '.join(problems)}")

    def restore(self, abstract_state: Any, step: int) -> Any:
        """The state of `step`, shaped, typed and sharded as `abstract_state` says, every array equal to what was saved.

        Raises:
          ValueError: when there is no such step.
          CheckpointMismatch: when a name, shape or dtype differs; before any array is read.
          CheckpointCorrupt: when files or arrays are not those that were saved.
        """
        wanted = _named(abstract_state)
        expected = self._check(wanted, step, "")
        restored = self._read(wanted, step)
        self._compare_prints(restored, expected, step)
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [restored[name] for name in wanted])

    def restore_parameters(self, abstract_parameters: Any, step: int) -> Any:
        """Only the parameters of `step`; raises as `restore` does."""
        prefix = "parameters/"
        wanted = {prefix + name: leaf for name, leaf in _named(abstract_parameters).items()}
        expected = self._check(wanted, step, prefix)
        restored = self._read(wanted, step)
        self._compare_prints(restored, expected, step)
        leaves = [restored[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract_parameters), leaves)

    def verify(self, abstract_state: Any, step: int) -> None:
        """Reads `step` back, some arrays at a time, and raises as `restore` does unless it is what was saved."""
        wanted = _named(abstract_state)
        expected = self._check(wanted, step, "")
        names = list(wanted)
        while names:
            some, size = {}, 0
            while names and (not some or size + wanted[names[0]].size <= _READ_AT_ONCE):
                some[names[0]] = wanted[names[0]]
                size += wanted[names.pop(0)].size
            self._compare_prints(self._read(some, step), expected, step)

    def quarantine(self, step: int, reason: str) -> epath.Path:
        """Moves a checkpoint, whole, out of the way into `quarantine/` beside the checkpoints, with the reason."""
        folder = self._directory.parent / QUARANTINE
        number = 1
        while (target := folder / f"{step}-{number}").exists():
            number += 1
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
            self.path(step).rename(target)
            (folder / f"{target.name}.txt").write_text(reason + "\n")
        target = epath.Path(of_first(str(target)))  # nobody goes on before it is there
        self._manager.reload()
        return target

    def quarantined(self) -> list[str]:
        """The names of the checkpoints in quarantine, as process 0 finds them."""
        folder = self._directory.parent / QUARANTINE
        return of_first(sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.exists() else [])

    def delete(self, step: int) -> None:
        """For good; `step` must not be saved again."""
        if is_first():  # the others may find it half gone: nobody reads the directory for it
            self.path(step).rmtree()

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state of `step`. Raises CheckpointCorrupt."""
        self._check_step(step)
        return self._described(step)[1]

    def _check_step(self, step: int) -> None:
        if step not in self.steps():
            found = ", ".join(map(str, self.steps())) or "none"
            raise ValueError(f"{self._directory}: no checkpoint of step {step}; steps there: {found}")

    def _check(self, wanted: dict[str, Any], step: int, prefix: str) -> dict[str, int] | None:
        """Everything that can be known before arrays are read. Returns the expected fingerprints."""
        self._check_step(step)
        prints, _ = self._described(step)
        stored = {name: leaf for name, leaf in self._stored(step).items() if name.startswith(prefix)}
        if prints is not None and (lost := {n for n in prints if n.startswith(prefix)} ^ stored.keys()):
            raise CheckpointCorrupt(f"checkpoint {self.path(step)}: the list of arrays was altered: {sorted(lost)}")
        self._compare(wanted, stored, step)
        return prints

    def _described(self, step: int) -> tuple[dict[str, int] | None, dict[str, Any]]:
        """(fingerprints by name, the run's metadata) of a checkpoint whose files are whole, found so by all processes.

        Where a kill came between the last file and the manifest, the fingerprints alone decide.
        """
        path = self.path(step)
        listed = damage(path, part=jax.process_index(), parts=jax.process_count())

        def described() -> dict[str, Any]:
            if listed:
                raise ValueError("; ".join(listed[:5]))
            return read_json(path / "metadata" / "metadata")

        content = self._whole(described, step)
        if content.keys() == _FORMAT_1 and not self.has_manifest(step):
            return None, content
        if content.pop("sha256", None) != _digest(content):
            raise CheckpointCorrupt(f"checkpoint {path}: its metadata were altered")
        if content["format"] != FORMAT:
            raise CheckpointMismatch(
                f"checkpoint {path} has format {content['format']}; this version of iha_jax reads 1 to {FORMAT}"
            )
        return content["fingerprints"], content["run"]

    def has_manifest(self, step: int) -> bool:
        return (self.path(step) / MANIFEST).exists()

    def adopt(self, step: int) -> None:
        """Writes the manifest that a kill has prevented, of a step that was restored and found right."""
        if is_first() and not self.has_manifest(step):
            write_manifest(self.path(step))

    def _stored(self, step: int) -> dict[str, Any]:
        def read() -> dict[str, Any]:
            tree: Any = ocp.PyTreeCheckpointHandler().metadata(self.path(step) / "state")
            return dict(getattr(tree, "tree", tree))

        return self._whole(read, step, "its list of arrays is unreadable: ")

    def _read(self, wanted: dict[str, Any], step: int) -> dict[str, Any]:
        arguments = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        # The handler alone: Orbax's Checkpointer waits for all processes after reading, also for one that has failed.
        handler = ocp.PyTreeCheckpointHandler()
        read = functools.partial(handler.restore, self.path(step) / "state", args=arguments)
        return self._whole(read, step, "its arrays are unreadable: ")

    def _whole(self, read: Callable[[], T], step: int, prefix: str = "") -> T:
        """`read()`, when it succeeds in every process; else CheckpointCorrupt in every one: each may read other files,
        and none must go on to wait for one that has failed."""
        found, problem = None, None
        try:
            found = read()
        except Exception as error:
            problem = f"{prefix}{_first_line(error)}"
        if problems := list(dict.fromkeys(text for text in of_all(problem) if text)):
            raise CheckpointCorrupt(f"checkpoint {self.path(step)}: {'; '.join(problems)}")
        return cast(T, found)

    def _compare_prints(self, arrays: dict[str, Any], expected: dict[str, int] | None, step: int) -> None:
        """Fingerprints are sums over all devices: every process finds the same and raises, or none does."""
        if expected is None:
            return
        prints, _ = inspect(arrays)
        if wrong := [name for name, value in prints.items() if value != expected[name]]:
            raise CheckpointCorrupt(f"checkpoint {self.path(step)}: altered since it was saved: {', '.join(wrong)}")

    def _compare(self, wanted: dict[str, Any], stored: dict[str, Any], step: int) -> None:
        problems = []
        for name in sorted(wanted.keys() | stored.keys()):
            if name not in stored:
                problems.append(f"{name}: missing in the checkpoint")
            elif name not in wanted:
                problems.append(f"{name}: only in the checkpoint")
            else:
                there, here = stored[name], wanted[name]
                if tuple(there.shape) != tuple(here.shape):
                    problems.append(
                        f"{name}: shape {tuple(there.shape)} in the checkpoint, {tuple(here.shape)} expected"
                    )
                elif str(there.dtype) != str(here.dtype):
                    problems.append(f"{name}: dtype {there.dtype} in the checkpoint, {here.dtype} expected")
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise CheckpointMismatch(f"checkpoint {self.path(step)} does not fit:\n{listed}")


def _cause(error: BaseException) -> str:
    """What went wrong first; Orbax's threads raise later errors, such as having waited in vain, on top of it."""
    while error.__cause__ or error.__context__:
        error = cast(BaseException, error.__cause__ or error.__context__)
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
