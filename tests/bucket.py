"""A stand-in for a bucket: gs:// objects kept in a folder, with no directories, no renames, and writes that are whole.

Worker processes find it as they would find gcsfs: by an entry point of fsspec on their path.
"""

import os
import tempfile
from pathlib import Path

import fsspec
from fsspec.spec import AbstractFileSystem

ROOT = "IHA_JAX_TEST_BUCKETS"


def use_bucket(tmp_path, monkeypatch):
    """From here to the end of the test gs:// is a folder under `tmp_path`, in this process and those it starts."""
    metadata = tmp_path / "plugin" / "bucket-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: bucket\nVersion: 1.0\n")
    names = "".join(f"{name} = tests.bucket:Bucket\n" for name in Bucket.protocol)
    (metadata / "entry_points.txt").write_text(f"[fsspec.specs]\n{names}")
    monkeypatch.syspath_prepend(str(tmp_path / "plugin"))
    monkeypatch.setenv(ROOT, str(tmp_path / "buckets"))
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    return tmp_path / "buckets"


class Bucket(AbstractFileSystem):
    protocol = ("gs", "gcs")
    cachable = True

    def _file(self, path):
        return Path(os.environ[ROOT]) / self._strip_protocol(path)

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            return open(self._file(path), "rb")
        assert mode == "wb", mode
        return _Upload(self._file(path))

    def info(self, path, **options):
        file, name = self._file(path), self._strip_protocol(path)
        if file.is_dir() and any(found.is_file() for found in file.rglob("*")):
            return {"name": name, "size": 0, "type": "directory"}
        if not file.is_file():
            raise FileNotFoundError(path)
        return {"name": name, "size": file.stat().st_size, "type": "file", "etag": file.stat().st_mtime_ns}

    def ls(self, path, detail=True, **options):
        name = self._strip_protocol(path)
        here = self.info(path)
        found = [here] if here["type"] == "file" else []
        for child in sorted(self._file(path).iterdir()) if not found else []:
            if child.is_file() or any(file.is_file() for file in child.rglob("*")):
                found.append(self.info(f"{name}/{child.name}"))
        return found if detail else [item["name"] for item in found]

    def mkdir(self, path, create_parents=True, **options):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rm_file(self, path):
        self._file(path).unlink()

    def rmdir(self, path):
        pass

    def rm(self, path, recursive=False, maxdepth=None):
        for name in self.find(path) if recursive else [path]:
            self.rm_file(name)

    def mv(self, *arguments, **options):
        raise AssertionError("a bucket has no cheap rename: do not count on one")

    rename = move = mv


class _Upload:
    """An object appears when its upload is closed without an error, and not before."""

    def __init__(self, file):
        self._target, self.closed, self.mode = file, False, "wb"
        self._scratch = tempfile.NamedTemporaryFile(delete=False)  # noqa: SIM115

    def write(self, data):
        return self._scratch.write(data)

    def flush(self):
        self._scratch.flush()

    def readable(self):
        return False

    def writable(self):
        return True

    def seekable(self):
        return False

    def close(self):
        if not self.closed:
            self.closed = True
            self._scratch.close()
            self._target.parent.mkdir(parents=True, exist_ok=True)
            Path(self._scratch.name).replace(self._target)

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        if kind is None:
            self.close()
        else:
            self._scratch.close()
            self.closed = True
