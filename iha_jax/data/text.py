"""Where text comes from: TFDS data sets, read as documents by range; nothing is downloaded here."""

import difflib
import hashlib
import os
from collections.abc import Iterator
from typing import Any, Protocol

from etils import epath

from iha_jax.data.storage import files_in, is_local, local_copy

EMBEDDED = "stdlib"


class TextSource(Protocol):
    """Documents as bytes, by range. `fingerprint` changes when the stored files do; making it reads no document."""

    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int, staging: str) -> Iterator[bytes]:
        """Documents [start, stop). Files of a bucket are copied whole into the local folder `staging` first."""
        ...

    def files(self, start: int, stop: int) -> set[str]:
        """Names of the files that hold documents [start, stop)."""
        ...


def default_cache(cache_dir: str) -> epath.Path:
    """`cache_dir`, else $IHA_JAX_CACHE, else ~/.cache/iha_jax."""
    return epath.Path(cache_dir or os.environ.get("IHA_JAX_CACHE") or "~/.cache/iha_jax").expanduser()


def is_text(document: bytes) -> bool:
    """Whether a document is valid UTF-8."""
    try:
        document.decode()
    except UnicodeDecodeError:
        return False
    return True


def open_text_source(
    name: str, split: str, *, data_dir: str = "", cache_dir: str = "", text_feature: str = "text"
) -> TextSource:
    """Opens "stdlib" (built on first use), a directory TFDS prepared (local or a bucket), a TFDS name, or conversations
    ("chat:PATH", `conversations.py`).

    Raises:
      ValueError: for a source that does not exist, is not prepared, is stored in a format without random access, or
        lacks the split, the feature or a file; saying what to run.
    """
    from iha_jax.data.conversations import Conversations, is_chat

    if is_chat(name):
        return Conversations(name, split)
    try:
        builder = open_builder(name, data_dir=data_dir, cache_dir=cache_dir)
    except ImportError as error:  # a bucket whose file system is not installed
        raise ValueError(f"data source {name!r}: {error}") from error
    check_split(builder, name, split, text_feature)
    file_format = builder.info.file_format.value
    if file_format != "array_record":  # parquet would read too, but loses rows in silence (TFDS 4.9.10)
        raise ValueError(
            f"data source {name!r} is stored as {file_format}; expected array_record. Write it as that once with: "
            f"python -m iha_jax.data.prepare --input={name} --output=DIR, and use DIR"
        )
    return _Documents(builder, split, text_feature)


def open_builder(name: str, *, data_dir: str = "", cache_dir: str = "") -> Any:
    """The TFDS builder of "stdlib" (built on first use), a prepared directory, or a TFDS name. Raises ValueError."""
    import tensorflow_datasets as tfds

    if name == EMBEDDED:
        from iha_jax.data.dataset import stdlib_dataset

        directory = stdlib_dataset(cache_dir)
    else:
        directory = epath.Path(name).expanduser()
    if is_prepared(directory):
        return tfds.builder_from_directory(directory)
    if "/" in name and (name.startswith(("/", ".", "~")) or "://" in name or directory.exists()):
        what = "holds no TFDS data set (no dataset_info.json)" if directory.exists() else "does not exist"
        if (directory / "prepare.json").exists():
            raise ValueError(f"data source {name!r}: its preparation was interrupted; run the same command again")
        raise ValueError(
            f"data source {name!r} {what}. Prepare text files with: "
            f"python -m iha_jax.data.prepare --input=FOLDER --output=DIR, and use DIR"
        )
    return _named_builder(name, data_dir)


def is_prepared(directory: epath.Path) -> bool:
    """Whether TFDS finished a data set there: it writes this file last, and so do we."""
    return (directory / "dataset_info.json").exists()


def check_split(builder: Any, name: str, split: str, text_feature: str) -> None:
    """Raises ValueError when a data set lacks the split, any document in it, or the feature; naming those it has."""
    if split not in builder.info.splits:
        found = ", ".join(map(repr, builder.info.splits)) or "none"
        raise ValueError(f"data source {name!r} has no split {split!r}; its splits: {found}")
    features: Any = builder.info.features or {}
    if text_feature not in features:
        raise ValueError(f"data source {name!r} has no feature {text_feature!r}; it has {sorted(features)}")
    if not builder.info.splits[split].num_examples:
        raise ValueError(f"data source {name!r}, split {split!r}: holds no document")
    there = files_in(epath.Path(builder.data_path))
    wanted = {epath.Path(i.filename).name for i in builder.info.splits[split].file_instructions}
    if missing := sorted(wanted - set(there)):
        raise ValueError(
            f"data source {name!r}, split {split!r}: {len(missing)} of its files are not there: {missing[:3]}"
        )


class _Documents:
    def __init__(self, builder: Any, split: str, feature: str):
        self._builder, self._split, self._feature = builder, split, feature
        self._directory = epath.Path(builder.data_path)
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        """Of names, sizes and times of the stored files, not of their contents: reading those may take hours."""
        total = hashlib.sha256(f"{self._split}:{self._feature}".encode())
        for name, (size, version) in sorted(files_in(self._directory).items()):
            total.update(f"{name}:{size}:{version}".encode())
        return total.hexdigest()

    def __len__(self) -> int:
        return self._builder.info.splits[self._split].num_examples

    def _slice(self, start: int, stop: int) -> str:
        return f"{self._split}[{start}:{stop}]"

    def files(self, start: int, stop: int) -> set[str]:
        instructions = self._builder.info.splits[self._slice(start, stop)].file_instructions
        return {epath.Path(i.filename).name for i in instructions}

    def read(self, start: int, stop: int, staging: str) -> Iterator[bytes]:
        import tensorflow_datasets as tfds

        builder = self._builder
        if not is_local(self._directory):
            for name in ("features.json", "dataset_info.json", *self.files(start, stop)):
                local_copy(self._directory / name, staging)
            builder = tfds.builder_from_directory(staging)
        source: Any = builder.as_data_source(self._slice(start, stop))  # type: ignore[call-issue]
        if len(source) != stop - start:
            raise ValueError(f"{self._directory}: {len(source)} documents in {self._slice(start, stop)}")
        for i in range(stop - start):
            yield as_bytes(source[i][self._feature])


def as_bytes(text: Any) -> bytes:
    """The value of a text feature, which TFDS gives as bytes or str."""
    return text.encode() if isinstance(text, str) else bytes(text)


def _named_builder(name: str, data_dir: str) -> Any:
    """Found by its files alone: TFDS's own code for a name may ask the network for facts, or for the data."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    known = [EMBEDDED, *tfds.list_builders(with_community_datasets=False)]
    try:
        return builder_from_files(name, data_dir=os.path.expanduser(data_dir) or None)
    except (DatasetNotFoundError, ValueError, ModuleNotFoundError, AssertionError) as error:
        base = name.split("/")[0].split(":")[0]
        if base in known:
            where = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
            raise ValueError(
                f"data source {name!r} is not prepared under {where}, and nothing is downloaded here. Set data_dir to "
                f"where it is, or prepare it once with: tfds build {name} --file_format=array_record ({error})"
            ) from error
        close = difflib.get_close_matches(base, known, n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"data source {name!r}: neither 'stdlib', a prepared directory, nor a TFDS name{hint}"
        ) from error
