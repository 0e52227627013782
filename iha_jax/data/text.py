"""Where text comes from: TFDS data sets, read as random-access sources of documents; nothing is downloaded here."""

import difflib
import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from etils import epath

EMBEDDED = "stdlib"
VALIDATION_PERCENT = 5


class TextSource(Protocol):
    """Documents as bytes, by index. `fingerprint` changes when the stored files do; making it reads no document."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes: ...


def default_cache(cache_dir: str) -> epath.Path:
    """`cache_dir`, else $IHA_JAX_CACHE, else ~/.cache/iha_jax."""
    return epath.Path(cache_dir or os.environ.get("IHA_JAX_CACHE") or "~/.cache/iha_jax").expanduser()


def split_of(path: str) -> str:
    """ "train" or "validation" (about 5 %), by a hash of the relative path: stable when files come or go."""
    bucket = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 100
    return "validation" if bucket < VALIDATION_PERCENT else "train"


def open_text_source(
    name: str, split: str, *, data_dir: str = "", cache_dir: str = "", text_feature: str = "text"
) -> TextSource:
    """Opens "stdlib" (built on first use), a directory TFDS prepared (local or a bucket), or a TFDS name.

    Raises:
      ValueError: for a source that does not exist, is not prepared, is stored in a format without random access, or
        lacks the split or the feature; saying what to run.
    """
    import tensorflow_datasets as tfds

    directory = stdlib_dataset(cache_dir) if name == EMBEDDED else epath.Path(name)
    if (directory / "dataset_info.json").exists():
        builder = tfds.builder_from_directory(directory)
    elif "/" in name and (directory.exists() or name.startswith(("/", ".", "gs://", "s3://"))):
        raise ValueError(
            f"data source {name!r}: no TFDS data set there (no dataset_info.json). Prepare text files with: "
            f"python -m iha_jax.data.prepare --input={name} --output=DIR, and use DIR"
        )
    else:
        builder = _named_builder(name, data_dir)
    if split not in builder.info.splits:
        found = ", ".join(map(repr, builder.info.splits)) or "none: it is not prepared"
        raise ValueError(f"data source {name!r} has no split {split!r}; its splits: {found}")
    features: Any = builder.info.features or {}
    if text_feature not in features:
        raise ValueError(f"data source {name!r} has no feature {text_feature!r}; it has {list(features)}")
    expected = builder.info.splits[split].num_examples
    try:
        source: Any = builder.as_data_source(split)  # type: ignore[call-issue]
    except NotImplementedError as error:
        raise ValueError(
            f"data source {name!r} is stored without random access ({builder.info.file_format}); prepare it again with "
            f"python -m iha_jax.data.prepare --input={name} --output=DIR, or as array_record"
        ) from error
    if len(source) != expected or not expected:
        raise ValueError(f"data source {name!r}, split {split!r}: {len(source)} documents found, {expected} recorded")
    return _Documents(source, text_feature, _fingerprint(epath.Path(builder.data_path), split, text_feature))


def _fingerprint(directory: epath.Path, split: str, text_feature: str) -> str:
    """Of names, sizes and times of the stored files, not of their contents: reading those may take hours."""
    total = hashlib.sha256(f"{split}:{text_feature}".encode())
    for file in sorted(directory.iterdir()):
        stat = file.stat()
        total.update(f"{file.name}:{stat.length}:{stat.mtime}".encode())
    return total.hexdigest()


class _Documents:
    def __init__(self, source: Any, feature: str, fingerprint: str):
        self._source, self._feature, self.fingerprint = source, feature, fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        text = self._source[index][self._feature]
        return text.encode() if isinstance(text, str) else bytes(text)


def _named_builder(name: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except (DatasetNotFoundError, ValueError, ModuleNotFoundError) as error:
        close = difflib.get_close_matches(name.split("/")[0], [EMBEDDED, *tfds.list_builders()], n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"data source {name!r}: neither 'stdlib', a prepared directory, nor a TFDS name{hint}"
        ) from error
    if not builder.data_path.exists():
        raise ValueError(
            f"data source {name!r} is not prepared under {builder.data_path.parent}; nothing is downloaded while "
            f"training. Set config.data.data_dir, or prepare it once with: tfds build {name} --file_format=array_record"
        )
    return builder


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


def stdlib_dataset(cache_dir: str = "") -> epath.Path:
    """The running Python's own standard library (tests left out) as a TFDS data set, built on first use."""
    root = sysconfig.get_paths()["stdlib"]
    files = _stdlib_files(root)
    listing = hashlib.sha256(repr(files).encode()).hexdigest()[:12]
    target = default_cache(cache_dir) / "datasets" / f"stdlib-{sysconfig.get_python_version()}-{listing}"
    if not (target / "dataset_info.json").exists():
        documents = ((path, os.path.join(root, path)) for path, size in files if size)
        write_dataset(target, ((path, _read(file)) for path, file in documents))
    return target


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def is_text(document: bytes) -> bool:
    """Whether a document is valid UTF-8."""
    try:
        document.decode()
    except UnicodeDecodeError:
        return False
    return True


def write_dataset(target: epath.Path, documents: Iterable[tuple[str, bytes]]) -> dict[str, int]:
    """Writes (path, text) documents as a TFDS data set with splits train and validation; returns their sizes.

    Documents that are not valid UTF-8 are left out. The directory appears whole or not at all.

    Raises:
      ValueError: when no document is valid text.
    """
    splits: dict[str, list[tuple[str, bytes]]] = {"train": [], "validation": []}
    for path, text in documents:
        if text and is_text(text):
            splits[split_of(path)].append((path, text))
    if not splits["train"] and not splits["validation"]:
        raise ValueError(f"no document with valid UTF-8 text for {target}")
    for empty, full in (("validation", "train"), ("train", "validation")):
        if not splits[empty]:  # a handful of files: the hash may leave a split without any
            moved = splits[full] if len(splits[full]) == 1 else [splits[full].pop()]
            splits[empty] = list(moved)
    _build(target, splits)
    return {name: len(items) for name, items in splits.items()}


def _build(target: epath.Path, splits: dict[str, list[tuple[str, bytes]]]) -> None:
    import tensorflow_datasets as tfds

    class PlainText(tfds.core.GeneratorBasedBuilder):
        """Text documents with their relative paths."""

        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = epath.Path(__file__).parent  # the class is local: TFDS cannot find its package by itself

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, description="Text documents.", features=features)

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
            return {name: self._generate_examples(items) for name, items in splits.items()}

        def _generate_examples(self, items: Sequence[tuple[str, bytes]]) -> Iterator[tuple[str, dict[str, Any]]]:
            for path, text in items:
                yield path, {"path": path, "text": text}

    scratch = target.parent / f".{target.name}.{os.getpid()}.tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        tfds.disable_progress_bar()
        builder = PlainText(data_dir=scratch, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        _publish(epath.Path(builder.data_dir), target)
    finally:
        scratch.rmtree(missing_ok=True)


def _publish(built: epath.Path, target: epath.Path) -> None:
    """Moves a finished directory to its place; a second process that was quicker with the same text wins."""
    try:
        built.rename(target)
    except OSError:
        if not (target / "dataset_info.json").exists():
            raise
