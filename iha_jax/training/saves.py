"""When a run's checkpoints are saved, confirmed, tried again and deleted."""

from collections.abc import Callable
from typing import Any

import jax

from iha_jax.training.checkpoint import CheckpointCorrupt, Checkpointer, SaveFailed, StateNotFinite

Metadata = Callable[[], dict[str, Any]]  # asked only when something is saved
ATTEMPTS = 3  # saves in a row that may fail before a run ends


class Saves:
    """The saving side of a training loop: `after_step` once a step, `finish` once at the end.

    A save is written in the background and confirmed by the first `after_step` that finds it ended: so a failure is
    told within a step, and tried again with the state of that step. `ATTEMPTS` failures in a row raise SaveFailed.

    Only a confirmed save makes older checkpoints go: `keep` of the newest stay, and the newest that was ever read back
    and found right (`verified`), whatever its age.
    """

    def __init__(
        self, checkpoints: Checkpointer, *, every: int, keep: int, verified: int | None, tell: Callable[[str], None]
    ):
        """`verified`: the step that the run was restored from."""
        self._checkpoints, self._every, self._keep, self._tell = checkpoints, every, keep, tell
        self._verified = verified
        self._failures = 0

    def after_step(self, step: int, state: Any, metadata: Metadata) -> None:
        """Saves when a save is due, and after a failed one; otherwise looks after the one under way."""
        due = step % self._every == 0
        if due or not self._checkpoints.saving():
            self._confirm()
        if (due or self._failures) and step not in self._checkpoints.common_steps():
            self._attempt(lambda: self._checkpoints.save(step, state, metadata=metadata()))

    def wait(self, step: int, state: Any, metadata: Metadata) -> None:
        """Returns when the state of `step` is on disk, confirmed. Raises SaveFailed."""
        while True:
            self._confirm()
            if step in self._checkpoints.common_steps():
                return
            self._attempt(lambda: self._checkpoints.save(step, state, metadata=metadata()))

    def finish(self, step: int, state: Any, metadata: Metadata) -> None:
        """Returns when the state of `step` is on disk and was read back and found right. Raises SaveFailed."""
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        for earlier in range(ATTEMPTS):  # the last of them raises
            self.wait(step, state, metadata)
            try:
                self._checkpoints.verify(like, step)
                break
            except CheckpointCorrupt as error:
                self._checkpoints.quarantine(step, str(error))
                self._failures = earlier  # written it was, which counts as a success
                self._failed(SaveFailed(f"what was saved is not what is read back: {error}"))
        self._verified = step
        self._delete_old()

    def _confirm(self) -> None:
        def confirm() -> None:
            if self._checkpoints.confirm() is not None:
                self._failures = 0
                self._delete_old()

        self._attempt(confirm)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except SaveFailed as error:
            self._failed(error)
        except StateNotFinite as error:
            error.add_note(f"last good checkpoint: step {self._checkpoints.latest_step()}")
            raise

    def _failed(self, error: SaveFailed) -> None:
        self._failures += 1
        if self._failures >= ATTEMPTS:
            good = self._checkpoints.latest_step()
            raise SaveFailed(f"{error}; failed {ATTEMPTS} times in a row, last good checkpoint: {good}") from error
        self._tell(f"WARNING: {error}; trying again ({self._failures} of {ATTEMPTS - 1})")

    def _delete_old(self) -> None:
        steps = self._checkpoints.common_steps()
        for step in steps[: -self._keep]:
            if step != self._verified:
                self._checkpoints.delete(step)
