"""Documents to a TFDS data set in array_record: a shard a unit, by several processes, resumable, local or in a bucket.

The directory is a data set once `dataset_info.json`, written last, is there; before that `.parts/` holds the facts of
the shards that are finished.
"""

import collections
import contextlib
import functools
import hashlib
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from iha_jax.data.documents import HASH, Listing, Unit, WholeFiles, name_hash
from iha_jax.data.jobs import Facts, run_jobs
from iha_jax.data.storage import SCRATCH, tidy, write_text, writing
from iha_jax.data.text import default_cache, is_prepared, is_text

VALIDATION_PERCENT = 5
SPLITS = ("train", "validation")
FORMAT = 1
PLAN, PARTS, NAME = "prepare.json", ".parts", "plain_text"
NAMED = 20  # documents left out that are named on the terminal; all are in prepare.json


def split_of(name: str) -> str:
    """ "train" or "validation" (about 5 %), by a hash of the relative path: stable when files come or go."""
    return "validation" if name_hash(name) % 100 < VALIDATION_PERCENT else "train"


def stdlib_dataset(cache_dir: str = "") -> epath.Path:
    """The running Python's own standard library (tests left out) as a TFDS data set, built on first use."""
    root = sysconfig.get_paths()["stdlib"]
    files = _stdlib_files(root)
    listing = hashlib.sha256(repr((FORMAT, files)).encode()).hexdigest()[:12]
    target = default_cache(cache_dir) / "datasets" / f"stdlib-{sysconfig.get_python_version()}-{listing}"
    if not is_prepared(target):
        names = sorted((name for name, size in files if size), key=name_hash)
        write_dataset(target, Listing((WholeFiles(root, tuple(names)),), listing))
    return target


@functools.cache
def _stdlib_files(root: str) -> tuple[tuple[str, int], ...]:
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skipped)
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                found.append((os.path.relpath(path, root).replace(os.sep, "/"), os.path.getsize(path)))
    return tuple(sorted(found))


def write_dataset(target: epath.Path, listing: Listing, *, workers: int = 1) -> dict[str, int]:
    """Writes the documents of a listing as a TFDS data set; returns the number of documents of each split.

    Documents that are empty or not valid UTF-8 are left out, named on stderr and in `prepare.json`. An interrupted call
    leaves finished shards behind; the next with the same listing goes on from them, and one that finds everything done
    does nothing. Files are split by a hash of their names; when that leaves a split without a document (a handful of
    files), the one with the smallest hash is the validation set, and a single document is cut at a line near its end.

    Raises:
      ValueError: when `target` is something else, or no document is valid text. Nothing is left at `target` then.
    """
    digest = hashlib.sha256(f"{FORMAT}:{listing.digest}".encode()).hexdigest()
    _check_target(target, digest)
    if is_prepared(target):
        tidy(target, PARTS)
        return json.loads((target / PLAN).read_text())["documents"]
    if not (target / PLAN).exists():
        write_text(target / PLAN, json.dumps({"digest": digest}))
    try:
        rule, results = _write_shards(target, listing.units, workers)
    except ValueError:
        target.rmtree()
        raise
    sizes = dict(_documents(results))
    left_out = [item for facts in results for item in facts["left_out"]]
    for name, why in left_out[:NAMED]:
        print(f"left out {name}: {why}", file=sys.stderr)
    if left_out:
        print(f"left out {len(left_out)} of {len(left_out) + sum(sizes.values())} documents", file=sys.stderr)
    facts = {"digest": digest, "documents": sizes, "rule": rule, "left_out": left_out}
    write_text(target / PLAN, json.dumps(facts, indent=2))
    _write_metadata(target, listing.units, results)
    tidy(target, PARTS)
    return sizes


def _check_target(target: epath.Path, digest: str) -> None:
    if not target.exists():
        return
    if not target.is_dir() or not (target / PLAN).exists():
        if target.is_dir() and not [p for p in target.iterdir() if p.name != SCRATCH]:
            return
        raise ValueError(f"{target}: exists already, and is no data set of this command; choose another name")
    if json.loads((target / PLAN).read_text())["digest"] != digest:
        state = "holds" if is_prepared(target) else "was begun with"
        raise ValueError(
            f"{target}: {state} other input (files, --suffix, --text_feature or --splits); delete it, or choose another"
        )


def _documents(results: list[Facts]) -> collections.Counter[str]:
    return sum(
        (collections.Counter({s: n for s, (n, _) in r["splits"].items()}) for r in results), collections.Counter()
    )


def _write_shards(target: epath.Path, units: tuple[Unit, ...], workers: int) -> tuple[list[str], list[Facts]]:
    """All shards, and the rule that says which split a document belongs to: [what, document]."""

    def write(rule: list[str]) -> list[Facts]:
        jobs = [(unit, rule, target, names) for unit, names in zip(units, _shard_names(units), strict=True)]
        folder = target / PARTS / rule[0]
        return list(run_jobs(_write_shard, jobs, folder, workers=workers, label=f"writing {target}"))

    rule = [HASH, ""]
    results = write(rule)
    documents = _documents(results)
    wanted = {split for names in _shard_names(units) for split in names}
    if not documents.total():
        raise ValueError(f"no document is valid UTF-8 text, so nothing was written to {target}")
    if empty := sorted(wanted - set(+documents)):
        if any(unit.split != HASH for unit in units):
            raise ValueError(f"split {empty[0]!r}: no document is valid UTF-8 text, so nothing was written to {target}")
        _, first = min(facts["smallest"] for facts in results if facts["smallest"])
        rule = ["cut" if documents.total() == 1 else "one", first]
        print(f"too few documents to split by hash: validation is {first}, {rule[0]}", file=sys.stderr)
        results = write(rule)
    return rule, results


def _shard_names(units: tuple[Unit, ...]) -> list[dict[str, str]]:
    """The file names of each unit's shards, by split: TFDS's own pattern."""
    wanted = [SPLITS if unit.split == HASH else (unit.split,) for unit in units]
    totals = collections.Counter(split for splits in wanted for split in splits)
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for splits in wanted:
        found.append({s: f"{NAME}-{s}.array_record-{seen[s]:05d}-of-{totals[s]:05d}" for s in splits})
        seen.update(splits)
    return found


def _features() -> Any:
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()})


def _write_shard(unit: Unit, rule: list[str], target: epath.Path, names: dict[str, str]) -> Facts:
    """One job: a unit's documents to one file a split (it may be empty), and what is in them."""
    from array_record.python.array_record_module import ArrayRecordWriter

    features, smallest = _features(), None
    splits = {split: [0, 0] for split in names}  # documents, bytes
    left_out = []
    with contextlib.ExitStack() as stack:
        writers = {}
        for split, name in names.items():
            writers[split] = ArrayRecordWriter(stack.enter_context(writing(target / name)), "group_size:1")
            stack.callback(writers[split].close)  # before the file moves to its place
        for name, text in unit.documents():
            if not text or not is_text(text):
                left_out.append([name, "not valid UTF-8" if text else "empty"])
                continue
            smallest = min(smallest or [f"{name_hash(name):064x}", name], [f"{name_hash(name):064x}", name])
            for split, part in _assign(unit.split, rule, name, text):
                record = features.serialize_example(features.encode_example({"path": name, "text": part}))
                writers[split].write(record)
                splits[split][0] += 1
                splits[split][1] += len(record)
    return {"splits": splits, "left_out": left_out, "smallest": smallest}


def _assign(split: str, rule: list[str], name: str, text: bytes) -> Iterator[tuple[str, bytes]]:
    what, chosen = rule
    if split != HASH:
        yield split, text
    elif what == HASH:
        yield split_of(name), text
    elif what == "one":
        yield "validation" if name == chosen else "train", text
    else:  # cut: at the last line that begins in the first 95 %, else at a character
        end = len(text) * (100 - VALIDATION_PERCENT) // 100
        at = text.rfind(b"\n", 0, end) + 1 or end
        while at and text[at] & 0xC0 == 0x80:
            at -= 1
        if not at:
            raise ValueError(f"{name}: the only document, and too short to cut a validation set off its end")
        yield "train", text[:at]
        yield "validation", text[at:]


def _write_metadata(target: epath.Path, units: tuple[Unit, ...], results: list[Facts]) -> None:
    """`features.json`, then `dataset_info.json`: made by TFDS in a local folder, and put in place whole."""
    import tensorflow_datasets as tfds

    with tempfile.TemporaryDirectory(prefix="iha_jax_") as folder:
        template = tfds.core.ShardedFileTemplate(
            data_dir=epath.Path(folder), dataset_name=NAME, filetype_suffix="array_record"
        )
        shards = collections.defaultdict(list)
        for names, facts in zip(_shard_names(units), results, strict=True):
            for split, name in names.items():
                (Path(folder) / name).touch()  # TFDS wants to see the files it describes
                shards[split].append(facts["splits"][split])
        infos = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[documents for documents, _ in found],
                num_bytes=sum(size for _, size in found),
                filename_template=template.replace(split=split),
            )
            for split, found in shards.items()
        ]
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=_features(),
            split_infos=infos,
            filename_template=template,
            description="Text documents with their names.",
            check_data=False,
        )
        for name in ("features.json", "dataset_info.json"):
            write_text(target / name, (Path(folder) / name).read_text())
