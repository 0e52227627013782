"""`python -m iha_jax.data.prepare --input=PATH --output=DIR`: text files to a TFDS data set, and to packed rows.

    python -m iha_jax.data.prepare --input=~/books --output=data/books                 # files -> TFDS data set
    python train.py --config=configs/base.py --workdir=runs/books --config.data.sources=data/books

`--input` is a folder (every file with `--suffix` is a document), one file, a `.jsonl` file or folder of them (a
document a line, under `--text_feature`), a directory TFDS prepared, or a TFDS name. With `--tokenizer` and
`--context_length` the rows of every split are packed too, ahead of training, with `--workers` processes; without, the
first run packs them.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from etils import epath

from iha_jax.data.rows import open_rows
from iha_jax.data.text import is_text, write_dataset
from iha_jax.data.tokenizers import load_tokenizer


def documents_of(path: epath.Path, suffix: str, text_feature: str) -> Iterator[tuple[str, bytes]]:
    """(relative path, text) of every document under a file or folder; names what is left out on stderr.

    Raises:
      ValueError: when there is no such path, no file, or a line of a .jsonl file cannot be used (with its number).
    """
    if not path.exists():
        raise ValueError(f"--input={path}: no such file or folder")
    files = [f for f in _files(path) if f.name.endswith(suffix)]
    if not files:
        raise ValueError(f"--input={path}: no file" + (f" with suffix {suffix!r}" if suffix else ""))
    for file in files:
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        found = _lines(file, name, text_feature) if name.endswith(".jsonl") else [(name, file.read_bytes())]
        for document, text in found:
            if text and is_text(text):
                yield document, text
            else:
                print(f"left out {document}: {'not valid UTF-8' if text else 'empty'}", file=sys.stderr)


def _files(path: epath.Path) -> list[epath.Path]:
    return [f for child in sorted(path.iterdir()) for f in _files(child)] if path.is_dir() else [path]


def _lines(file: epath.Path, name: str, text_feature: str) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[text_feature]
            yield f"{name}:{number}", text.encode()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}, line {number}: expected a JSON object with a string {text_feature!r} ({error!r})"
            ) from error


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 2 refused input."""
    parser = argparse.ArgumentParser(prog="python -m iha_jax.data.prepare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", help="directory of the TFDS data set; not for --input that is one already")
    parser.add_argument("--suffix", default="", help="only files whose names end so, such as .txt")
    parser.add_argument("--text_feature", default="text")
    parser.add_argument("--data_dir", default="", help="where TFDS finds named data sets")
    parser.add_argument("--cache_dir", default="", help="where packed rows go")
    parser.add_argument("--tokenizer", default="", help="bytes | hf:FILE | sp:FILE: pack rows too")
    parser.add_argument("--context_length", type=int, default=0)
    parser.add_argument("--splits", default="train,validation")
    parser.add_argument("--workers", type=int, default=1)
    flags = parser.parse_args(arguments)
    try:
        _prepare(flags)
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _prepare(flags: argparse.Namespace) -> None:
    source = flags.input
    path = epath.Path(flags.input).expanduser()
    if flags.output:
        target = epath.Path(flags.output)
        if target.exists():
            raise ValueError(f"--output={target}: exists already; choose another, or delete it")
        sizes = write_dataset(target, documents_of(path, flags.suffix, flags.text_feature))
        print(f"wrote {target}: " + ", ".join(f"{count} documents in {name}" for name, count in sizes.items()))
        source = str(target)
    elif not flags.tokenizer:
        raise ValueError("nothing to do: expected --output=DIR, or --tokenizer and --context_length, or both")
    if flags.tokenizer:
        tokenizer = load_tokenizer(flags.tokenizer)
        for split in flags.splits.split(","):
            rows = open_rows(
                source=source,
                split=split,
                tokenizer=tokenizer,
                context_length=flags.context_length,
                data_dir=flags.data_dir,
                cache_dir=flags.cache_dir,
                text_feature="text" if flags.output else flags.text_feature,
                workers=flags.workers,
            )
            print(f"{split}: {len(rows):,} rows of {rows.context_length} tokens, {rows.num_bytes:,} bytes")


if __name__ == "__main__":
    main()
