"""Checkpoints through Orbax: saved in the background, kept by policy, compared name by name before they are read."""

from collections.abc import Mapping
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath

from iha_jax.data.storage import absolute, is_local
from iha_jax.parallel.processes import of_first


class CheckpointMismatch(ValueError):  # noqa: N818  a mismatch is what it is
    """A checkpoint does not hold what is asked of it. The message lists every difference by name."""


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
    """The checkpoints of one run directory: `directory/<step>/`.

    A state is stored as a flat dictionary from names to arrays. `keep` is how many of the newest steps stay (None:
    all, for reading).
    """

    def __init__(self, directory: epath.PathLike, *, keep: int | None):
        self._directory = absolute(directory)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=keep is not None,
            enable_async_checkpointing=True,
            create=keep is not None,
            save_root_metadata=False,  # there is none, and Orbax would wait for all processes to not write it
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The finished steps, as the directory lists them. In a bucket an unfinished one has its final name already."""
        if not self._directory.exists():
            return []
        found = [path for path in self._directory.iterdir() if path.name.isdigit()]
        return sorted(int(path.name) for path in found if is_local(path) or ocp.utils.is_checkpoint_finalized(path))

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def common_step(self) -> int | None:
        """The newest step as process 0 finds it. Every process calls this, and must find that step too.

        Raises:
          ValueError: in a process that does not: its directory is another one.
        """
        newest = of_first(self.latest_step())
        if newest is not None:
            self._check_step(newest)
        return newest

    def save(self, step: int, state: Any, *, metadata: Mapping[str, Any]) -> None:
        """Starts saving `state` and a JSON of `metadata`; returns once the arrays are copied. A step that is on disk
        already is left alone. A failure of the previous save surfaces here or in `wait`."""
        if step in self.steps():
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(_named(state)), metadata=ocp.args.JsonSave(dict(metadata))
        )
        try:
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:
            raise RuntimeError(f"saving a checkpoint into {self._directory} failed: {error}") from error

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises RuntimeError when it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise RuntimeError(f"saving a checkpoint into {self._directory} failed: {error}") from error

    def close(self) -> None:
        self._manager.close()

    def restore(self, abstract_state: Any, step: int) -> Any:
        """The state of `step`, shaped, typed and sharded as `abstract_state` says.

        Raises:
          ValueError: when there is no such step.
          CheckpointMismatch: when a name, shape or dtype differs; before any array is read.
        """
        wanted = _named(abstract_state)
        self._compare(wanted, self._stored(step), step)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [restored["state"][name] for name in wanted])

    def restore_parameters(self, abstract_parameters: Any, step: int) -> Any:
        """Only the parameters of `step`; raises as `restore` does."""
        prefix = "parameters/"
        wanted = {prefix + name: leaf for name, leaf in _named(abstract_parameters).items()}
        stored = self._stored(step)
        self._compare(wanted, {name: leaf for name, leaf in stored.items() if name.startswith(prefix)}, step)
        arguments = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = reader.restore(self._directory / str(step) / "state", args=arguments)
        leaves = [restored[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract_parameters), leaves)

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state of `step`."""
        self._check_step(step)
        return self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]

    def _check_step(self, step: int) -> None:
        if step not in self.steps():
            found = ", ".join(map(str, self.steps())) or "none"
            raise ValueError(f"{self._directory}: no checkpoint of step {step}; steps there: {found}")

    def _stored(self, step: int) -> dict[str, Any]:
        self._check_step(step)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.metadata(self._directory / str(step) / "state")
        tree = getattr(found, "item_metadata", found)
        return dict(getattr(tree, "tree", tree))

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
            raise CheckpointMismatch(f"checkpoint {self._directory / str(step)} does not fit:\n{listed}")
