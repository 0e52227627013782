"""`python -m iha_jax.data.prepare`: text to a TFDS data set (array_record), and to packed rows.

    python -m iha_jax.data.prepare --input=~/books --suffix=.txt --output=data/books     # files -> TFDS data set
    python train.py --config=configs/base.py --workdir=runs/books --config.data.sources=data/books

    python -m iha_jax.data.prepare --input=c4/en --data_dir=gs://bucket/tfds --cache_dir=gs://bucket/rows \\
        --tokenizer=hf:tokenizer.json --context_length=8192 --workers=8                  # TFDS data set -> packed rows

`--input` is a folder (every file with `--suffix` is a document; of a .jsonl file, every line is, under
`--text_feature`), one file, a directory TFDS prepared (array_record or tfrecord), or a TFDS name. Any path may be a
bucket's. With `--output` the documents are written as a TFDS data set; with `--tokenizer` and `--context_length` the
rows of `--splits` are packed, ahead of training; with both, one after the other. Training packs what is not packed yet.

Stopped or killed, the same command goes on where it was. Nothing is ever downloaded.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from etils import epath

from iha_jax.data.dataset import write_dataset
from iha_jax.data.documents import Listing, list_files, list_stored
from iha_jax.data.rows import open_rows
from iha_jax.data.storage import absolute
from iha_jax.data.text import EMBEDDED, is_prepared
from iha_jax.data.tokenizers import load_tokenizer


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 2 refused input."""
    parser = argparse.ArgumentParser(prog="python -m iha_jax.data.prepare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", default="", help="directory of the TFDS data set")
    parser.add_argument("--suffix", default="", help="only files whose names end so, such as .txt")
    parser.add_argument("--text_feature", default="text", help="of .jsonl lines and TFDS data sets")
    parser.add_argument("--data_dir", default="", help="where TFDS finds named data sets")
    parser.add_argument("--cache_dir", default="", help="where packed rows go; as config.data.cache_dir in training")
    parser.add_argument("--tokenizer", default="", help="bytes | hf:FILE | sp:FILE: pack rows")
    parser.add_argument("--context_length", type=int, default=0)
    parser.add_argument("--splits", default="train,validation")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    flags = parser.parse_args(arguments)
    try:
        _prepare(flags)
    except (ValueError, ImportError) as error:  # ImportError: a bucket whose file system is not installed
        print(f"refused: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _prepare(flags: argparse.Namespace) -> None:
    if not flags.output and not flags.tokenizer:
        raise ValueError("nothing to do: expected --output=DIR, or --tokenizer and --context_length, or both")
    if flags.workers < 1:
        raise ValueError(f"--workers={flags.workers}: expected at least 1")
    if bool(flags.tokenizer) != (flags.context_length > 0):
        raise ValueError(
            f"--tokenizer={flags.tokenizer} --context_length={flags.context_length}: expected both or neither, "
            f"and at least one token of context"
        )
    tokenizer = load_tokenizer(flags.tokenizer) if flags.tokenizer else None
    splits = [name for name in flags.splits.split(",") if name]
    if not splits:
        raise ValueError("--splits: expected some names, such as train,validation")
    source, text_feature = flags.input, flags.text_feature
    if flags.output:
        target, folder = absolute(flags.output), absolute(flags.input)
        if target == folder or folder in target.parents:
            raise ValueError(f"--output={flags.output}: lies in --input={flags.input}, and would be its own input")
        listing = _listing(flags, splits)
        sizes = write_dataset(target, listing, workers=flags.workers)
        print(f"{target}: " + ", ".join(f"{count:,} documents in {name}" for name, count in sizes.items()))
        source, text_feature = flags.output, "text"
    if tokenizer:
        for split in splits:
            rows = open_rows(
                source=source,
                split=split,
                tokenizer=tokenizer,
                context_length=flags.context_length,
                data_dir=flags.data_dir,
                cache_dir=flags.cache_dir,
                text_feature=text_feature,
                workers=flags.workers,
            )
            print(f"{split}: {len(rows):,} rows of {rows.context_length} tokens, {rows.num_bytes:,} bytes")


def _listing(flags: argparse.Namespace, splits: list[str]) -> Listing:
    path = epath.Path(flags.input).expanduser()
    if flags.input == EMBEDDED or is_prepared(path) or not path.exists():
        if not path.exists() and ("://" in flags.input or flags.input.startswith(("/", ".", "~"))):
            raise ValueError(f"--input={flags.input}: no such file or folder")
        return list_stored(
            flags.input, splits, data_dir=flags.data_dir, cache_dir=flags.cache_dir, text_feature=flags.text_feature
        )
    if unknown := set(splits) - {"train", "validation"}:
        raise ValueError(f"--splits={flags.splits}: {min(unknown)!r} is neither train nor validation, those of files")
    return list_files(path, flags.suffix, flags.text_feature)


if __name__ == "__main__":
    main()
