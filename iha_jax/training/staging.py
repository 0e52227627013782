"""Where the files of a run that grow are written: in the run directory, or beside it where that is a bucket."""

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor

from etils import epath
from tqdm import tqdm

from iha_jax.data.storage import is_local, send

UPLOAD_SECONDS = 60.0  # between two uploads in the background


class Staging:
    """`folder` stands for `directory` while files are written: it is that directory, where it is local.

    Objects of a bucket cannot be appended to. There `folder` is one of this machine, and files that changed are
    uploaded whole under their own names: `offer` does so in the background and at most once in UPLOAD_SECONDS, `flush`
    before it returns. Whole, rather than in numbered parts, because any reader of a run directory then finds the file
    it expects; the metrics of a long run are some megabytes.

    An upload that fails is tried again (see `storage.send`), then said on the terminal and left for the next one: it
    does not end training. `folder` stays until all of it is uploaded, so it outlives a crash; `resume` keeps what it
    holds, a new start does not.
    """

    def __init__(self, directory: epath.PathLike, *, resume: bool):
        self._directory = epath.Path(directory)
        self._remote = not is_local(directory)
        self.folder = self._directory
        self._sent: dict[str, tuple[int, int]] = {}
        self._pending: Future[bool] | None = None
        self._due = 0.0
        if self._remote:
            name = hashlib.sha256(os.fspath(directory).encode()).hexdigest()[:16]
            own = epath.Path(tempfile.gettempdir()) / f"iha_jax_{os.getuid()}"
            own.mkdir(mode=0o700, exist_ok=True)
            self.folder = own / name
            if not resume:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
            self._thread = ThreadPoolExecutor(max_workers=1)

    def offer(self) -> None:
        """Starts uploading what has changed, unless the last upload is still running or not long enough ago."""
        if not self._remote or time.monotonic() < self._due or (self._pending and not self._pending.done()):
            return
        self._due = time.monotonic() + UPLOAD_SECONDS
        self._pending = self._thread.submit(self._upload)

    def flush(self) -> bool:
        """Returns when everything is uploaded (True), or could not be (False) and that was said."""
        if not self._remote:
            return True
        self._pending = self._thread.submit(self._upload)  # after the one that may be running: there is one thread
        return self._pending.result()

    def close(self) -> None:
        """Uploads what is left. Raises RuntimeError, naming the folder that still has it, when that fails."""
        if not self._remote:
            return
        done = self.flush()
        self._thread.shutdown()
        if not done:
            raise RuntimeError(f"{self._directory} lacks what could not be uploaded; it is kept in {self.folder}")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _upload(self) -> bool:
        try:
            for root, _, names in os.walk(self.folder):
                for name in names:
                    self._upload_file(os.path.relpath(os.path.join(root, name), self.folder))
        except Exception as error:
            with contextlib.suppress(Exception):  # a closed terminal
                tqdm.write(f"uploading to {self._directory} failed, training goes on: {error!r}", file=sys.stderr)
            return False
        return True

    def _upload_file(self, name: str) -> None:
        found = os.stat(self.folder / name)
        version = (found.st_size, found.st_mtime_ns)  # taken first: what is written meanwhile is uploaded next time
        if self._sent.get(name) != version:
            send(self.folder / name, self._directory / name)
            self._sent[name] = version
