"""Files on a local disk or in a bucket (gs://, s3://, ...) behind the same few verbs.

A bucket has no directories and no renames that are worth having: what must be complete before it is found is written as
one object, and a set of files counts as complete when its metadata file, written last, is there.
"""

import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import fsspec.config
from etils import epath

# A client remembers the listings of its bucket, but other processes write there too: a run, its comparison, its reader.
for _protocol in ("gs", "gcs", "s3"):
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)

PERMANENT = (PermissionError, FileNotFoundError, IsADirectoryError, ImportError)  # trying again would not help
LARGEST_JSON = 64 * 2**20  # bytes; a larger file of metadata was not written here
SCRATCH = ".incomplete"  # half-written files of a local directory, under their host's name and process's id


def is_local(path: epath.PathLike) -> bool:
    """Whether a path is of this machine's file system rather than of a bucket."""
    return "://" not in os.fspath(path)


def check_library(path: epath.PathLike) -> None:
    """Raises ValueError, naming what to install, for a path in a bucket whose file system is not installed."""
    if not is_local(path):
        protocol = os.fspath(path).partition("://")[0]
        try:
            fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: cannot be reached: {error}") from error


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that stays what it is when the working directory changes; a bucket's is one already, and resolving it
    would make a local path of it."""
    check_library(path)
    found = epath.Path(path).expanduser()
    return found.resolve() if is_local(found) else found


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[str]:
    """The name of a local file to write to; it appears at `path` whole at the end, or after an error not at all.

    Whoever else writes the same path writes the same content: the quicker one wins.
    """
    if not is_local(path):
        with tempfile.TemporaryDirectory(prefix="iha_jax_") as folder:
            scratch = epath.Path(folder) / path.name
            yield os.fspath(scratch)
            scratch.copy(path, overwrite=True)
        return
    scratch = path.parent / SCRATCH / f"{path.name}.{socket.gethostname()}.{os.getpid()}"  # disks may be shared
    scratch.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield os.fspath(scratch)
        scratch.replace(path)
    except FileNotFoundError:  # the quicker one has tidied up already
        if not path.exists() and path.parent.exists():
            raise
    finally:
        Path(scratch).unlink(missing_ok=True)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    with writing(path) as scratch:
        Path(scratch).write_text(text, encoding="utf-8")


def read_json(path: epath.Path) -> dict[str, Any]:
    """The JSON object in a small file. Raises ValueError, naming the file, when something else is in it."""
    if path.stat().length > LARGEST_JSON:
        raise ValueError(f"{path}: larger than {LARGEST_JSON} bytes")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return content


def send(file: epath.PathLike, path: epath.Path, *, attempts: int = 4, seconds: float = 1.0) -> None:
    """Copies a local file to `path`, whole. What fails is tried again after 1, 2, 4, ... times `seconds`; the last
    failure, or one of `PERMANENT`, is raised."""
    for attempt in range(attempts):
        try:
            epath.Path(file).copy(path, overwrite=True)
            return
        except PERMANENT:
            raise
        except Exception:
            if attempt == attempts - 1:
                raise
            time.sleep(seconds * 2**attempt)


def tidy(directory: epath.Path, *folders: str) -> None:
    """Removes what an interrupted call left behind in `directory`, and these folders of it."""
    for folder in (SCRATCH, *folders):
        with contextlib.suppress(OSError):  # not there, or another process is still writing into it
            (directory / folder).rmtree()


def _file_system(path: epath.PathLike) -> tuple[Any, str]:
    return fsspec.core.url_to_fs(os.fspath(path))


def files_under(folder: epath.Path) -> dict[str, tuple[int, str]]:
    """Relative path -> (size in bytes, time or tag of the last change) of every file under a folder."""
    system, root = _file_system(folder)
    found = system.find(root, detail=True)
    return {
        name.removeprefix(root).lstrip("/"): (int(info["size"]), _version(info)) for name, info in sorted(found.items())
    }


def files_in(folder: epath.Path) -> dict[str, tuple[int, str]]:
    """The same of the files directly in a folder; empty when there is no such folder."""
    system, root = _file_system(folder)
    system.invalidate_cache()
    try:
        found = system.ls(root, detail=True)
    except FileNotFoundError:
        return {}
    return {os.path.basename(i["name"]): (int(i["size"]), _version(i)) for i in found if i["type"] != "directory"}


def _version(info: dict[str, Any]) -> str:
    return str(next((info[key] for key in ("etag", "ETag", "mtime", "LastModified") if info.get(key)), ""))


def read_range(path: epath.PathLike, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file, in one request."""
    system, name = _file_system(path)
    return system.cat_file(name, start, stop)


def local_copy(path: epath.Path, folder: str) -> epath.Path:
    """A bucket's file under its own name in a local folder, copied there unless it is there; a local file itself."""
    if is_local(path):
        return path
    copy = epath.Path(folder) / path.name
    if not copy.exists():
        with writing(copy) as scratch:
            path.copy(scratch)
    return copy
