"""The files of a finished checkpoint: their sizes and checksums, written last, compared before anything is read.

Fingerprints (`fingerprint.py`) say whether the arrays are the ones that were saved; they can be asked only after all
processes have read together. The manifest says beforehand, each process on its own and without raising, whether a file
is missing or cut off, or, if it is not one of the large ones that hold arrays, altered: so that all can agree on a step
before any of them waits for another inside a read.
"""

import json
import os
import zlib
from collections.abc import Iterable

from etils import epath

from iha_jax.data.storage import LARGEST_JSON, files_under, is_local, read_json, write_text

FILE = "manifest.json"
_CHECKED = 2**20  # bytes; checksums of larger files would cost as much as fingerprints, which find what they would


def write_manifest(directory: epath.Path) -> None:
    """Describes every file under a finished checkpoint `directory` in its `manifest.json`.

    Raises:
      ValueError: when there are none.
    """
    files = _describe(directory, _names(directory))
    if not files:
        raise ValueError(f"{directory}: no files; a checkpoint was expected there")
    write_text(directory / FILE, json.dumps(files, indent=0, sort_keys=True))


def foreign(directory: epath.Path) -> list[str]:
    """What was never written here, whatever a manifest says of it: links, and huge files beside those of arrays (`d/`).

    To be asked before anything of a checkpoint is read.
    """
    problems = [f"{os.fspath(path)}: is a link; links are not followed" for path in _links(directory)]
    return problems or [
        f"{name}: larger than {LARGEST_JSON} bytes"
        for name, (size, _) in files_under(directory).items()
        if size > LARGEST_JSON and "d" not in name.split("/")
    ]


def damage(directory: epath.Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint, empty when nothing is. Never raises for what it finds.

    Without a manifest only what is `foreign`.
    Checksums are computed of every `parts`-th file, from number `part` on; names, sizes and links are checked of all.
    """
    try:
        if problems := foreign(directory):
            return problems
        if not (directory / FILE).exists():  # a kill came between the last file and the manifest
            return []
        expected = read_json(directory / FILE)
        if not expected:
            return [f"{FILE}: lists no files"]
        names = _names(directory)
        problems = [f"{name}: missing" for name in sorted(expected.keys() - names)]
        problems += [f"{name}: not listed in {FILE}" for name in sorted(names - expected.keys())]
        problems += [
            f"{name}: {size} bytes, {expected[name][0]} were written"
            for name, size in sizes(directory).items()
            if name in expected and size != expected[name][0]
        ]
        if not problems:
            found = _describe(directory, sorted(names)[part::parts])
            problems = [f"{name}: altered" for name, entry in found.items() if entry != expected[name]]
        return problems
    except (OSError, ValueError, TypeError, LookupError) as error:
        return [f"{type(error).__name__}: {error}"]


def sizes(directory: epath.Path) -> dict[str, int]:
    """Bytes of every file of a checkpoint but the manifest."""
    return {name: size for name, (size, _) in files_under(directory).items() if name != FILE}


def _names(directory: epath.Path) -> set[str]:
    return set(sizes(directory))


def _describe(directory: epath.Path, names: Iterable[str]) -> dict[str, list[int | str]]:
    """[size, checksum or ""] by name. A bucket checks its own objects: its tag, which changes with the content, is
    taken."""
    there, chosen = files_under(directory), sorted(names)
    if not is_local(directory):
        return {name: [there[name][0], there[name][1]] for name in chosen}
    sizes = {name: there[name][0] for name in chosen}
    return {name: [size, f"{_crc32(directory / name):08x}" if size <= _CHECKED else ""] for name, size in sizes.items()}


def _crc32(path: epath.Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value


def _links(directory: epath.Path) -> list[str]:
    if not is_local(directory):
        return []
    return [
        os.path.join(folder, name)
        for folder, folders, files in os.walk(directory)
        for name in (*folders, *files)
        if os.path.islink(os.path.join(folder, name))
    ]
