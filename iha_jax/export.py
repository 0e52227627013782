"""The command that writes a checkpoint as `safetensors` + `config.json`, and the function that reads it again.

Global causal MHA with RoPE is written as Hugging Face's `transformers` loads it (`model/transformers_layout.py`): the
folder is a model there, `AutoModelForCausalLM.from_pretrained(DIR)`. Every other model has the plain layout: our own
names with dots, `layers.3.attention.query` (layers from 0), and our own shapes, which `config.json` lists under
`iha_jax.weights`. V vocabulary, D width, H heads, K key/value heads, d head width, F feed-forward width; s and g source
and output heads, h heads, p pseudo-heads. What is computed with them: `iha_jax/ops/reference.py` (attention as loops)
and `iha_jax/model/transformer.py`; weights have their inputs in front, `q[H, d] = sum_D x[D] query[D, H, d]`.

`config.json` holds our model config (`iha_jax.model`) in both layouts, and `load_exported` reads both.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from iha_jax.training.command import REFUSED

VERSION = 1  # of the plain layout
DTYPES = ("float32", "bfloat16")
SHARD_BYTES = 4 * 2**30  # of the largest file, unless one weight is larger
_INDEX = "model.safetensors.index.json"


def export(
    run: Any, output: str, *, dtype: str = "float32", layout: str = "auto", shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """Writes parameters of a run (`evaluation.run.Restored`) to a new folder, whole or not at all.

    Weights are fetched from the devices and written one file at a time: beside the parameters, the host holds at most
    `shard_bytes`. Returns what was written: "layout", "why_plain", "files", "bytes".

    Raises:
      ValueError: for an output folder that holds something, an unknown dtype, or `layout="transformers"` for a model
        that no class there computes.
    """
    from iha_jax.data.corpus import open_tokenizer

    folder = _check_output(output)
    why = _why_plain(run.config.model, layout)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype}: expected one of {', '.join(DTYPES)}")
    tokenizer = open_tokenizer(run.config)
    with _whole_folder(folder) as scratch:
        written = _write_weights(scratch, run.config.model, run.parameters, bool(why), dtype, shard_bytes)
        said = _tokenizer_files(scratch, tokenizer, run.config.model.context_length)
        _write_config(scratch, run, bool(why), dtype, tokenizer.document_id, said)
        files = sorted(path.name for path in scratch.iterdir())
    return {"layout": "plain" if why else "transformers", "why_plain": why, "files": files, "bytes": written}


def load_exported(directory: str) -> tuple[Any, dict[str, Any]]:
    """`(ModelConfig, parameters)` of a folder that `export` wrote, in either layout; parameters are float32.

    Raises:
      ValueError: for a folder without our `config.json`, missing or surplus weights, or other shapes, by name.
    """
    import jax.numpy as jnp
    import numpy as np
    from etils import epath

    from iha_jax.config import resolve_model
    from iha_jax.data.storage import read_json
    from iha_jax.model.by_layer import stack_layers
    from iha_jax.model.transformer import abstract_parameters

    safetensors = _safetensors()
    folder = Path(directory)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{directory}: is no exported model (no config.json)")
    ours = read_json(epath.Path(folder) / "config.json").get("iha_jax")
    if not isinstance(ours, dict) or ours.get("version") != VERSION:
        raise ValueError(f"{directory}/config.json: expected a section iha_jax of version {VERSION}")
    config = resolve_model(ours["model"])
    layout = _layout(config, ours["layout"] == "plain")
    places = {stored.name: (name, stored) for name, (stored, _) in layout.items()}
    weights, problems = {}, []
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(os.fspath(file), framework="numpy") as content:
            for key in content.keys():  # noqa: SIM118  not a mapping
                found = content.get_tensor(key)
                if key not in places:
                    problems.append(f"{key}: not of this model")
                elif found.shape != places[key][1].shape:
                    problems.append(f"{key}: {found.shape}, expected {places[key][1].shape}")
                else:
                    name, stored = places[key]
                    weights[name] = jnp.asarray(stored.read(found).astype(np.float32))
    problems += [f"{stored.name}: missing" for name, (stored, _) in layout.items() if name not in weights]
    if problems:
        raise ValueError(f"{directory} does not hold this model:\n" + "\n".join(f"  - {p}" for p in sorted(problems)))
    return config, stack_layers(abstract_parameters(config), config, weights)


def _layout(config: Any, plain: bool, parameters: Any = None) -> dict[str, tuple[Any, tuple[Any, int | None]]]:
    """{weight: (how it is stored, where it is in `parameters`)} in the order of the tree; without them, of shapes."""
    from iha_jax.model.by_layer import slices_by_layer
    from iha_jax.model.transformer import abstract_parameters
    from iha_jax.model.transformers_layout import Stored, stored

    found = {}
    for name, (leaf, group) in slices_by_layer(parameters or abstract_parameters(config), config).items():
        shape = tuple(leaf.shape if group is None else leaf.shape[1:])
        if plain:
            place = Stored(name.replace("layer_", "layers/").replace("/", "."), shape, lambda x: x, lambda x: x)
        else:
            place = stored(name, shape, config)
        found[name] = place, (leaf, group)
    return found


def _write_weights(
    folder: Path, config: Any, parameters: dict[str, Any], plain: bool, dtype: str, shard_bytes: int
) -> int:
    import jax
    import jax.numpy as jnp
    import numpy as np

    save_file = _safetensors().numpy.save_file
    layout = _layout(config, plain, parameters)
    width = np.dtype(jnp.dtype(dtype)).itemsize
    shards = _shards({name: width * int(np.prod(stored.shape)) for name, (stored, _) in layout.items()}, shard_bytes)
    places, total = {}, 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {}
        for name in names:
            stored, (leaf, group) = layout[name]
            value = np.asarray(jax.device_get(leaf if group is None else leaf[group])).astype(jnp.dtype(dtype))
            tensors[stored.name] = np.ascontiguousarray(stored.write(value))
            places[stored.name] = file
            total += tensors[stored.name].nbytes
        save_file(tensors, folder / file, metadata={"format": "pt"})  # what transformers asks for; no more than a word
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, as many to a file as fit."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _write_config(folder: Path, run: Any, plain: bool, dtype: str, document_id: int, tokenizer: dict[str, Any]) -> None:
    from iha_jax.config import as_dict
    from iha_jax.model.transformers_layout import transformers_config

    model = run.config.model
    ours: dict[str, Any] = {
        "version": VERSION,
        "layout": "plain" if plain else "transformers",
        "step": run.step,
        "checkpoint_digest": run.digest,
        "model": as_dict(run.config)["model"],
        "tokenizer": tokenizer,
    }
    if plain:
        ours["weights"] = {stored.name: _described(name, stored) for name, (stored, _) in _layout(model, True).items()}
    theirs = {"model_type": "iha_jax"} if plain else transformers_config(model, document_id)
    values = theirs | {"dtype": dtype, "torch_dtype": dtype, "iha_jax": ours}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def _described(name: str, stored: Any) -> str:
    """ "D H d = 24 6 4"."""
    from iha_jax.parallel.rules import WEIGHTS

    letters = next(dimensions for end, dimensions in WEIGHTS.items() if f"/{name}".endswith(f"/{end}"))
    if letters == "*":
        letters = ("g h p" if len(stored.shape) == 3 else "h p") if name.endswith("collapse") else "width"
    return f"{letters} = {' '.join(map(str, stored.shape))}"


def _tokenizer_files(folder: Path, tokenizer: Any, context_length: int) -> dict[str, Any]:
    """Copies the tokenizer's file, and returns what `config.json` says of it."""
    from etils import epath

    kind, _, path = tokenizer.spec.partition(":")
    said = {"kind": kind, "document_id": tokenizer.document_id, "digest": tokenizer.digest}
    if kind == "bytes":
        return said | {"rule": "UTF-8 bytes are ids 0 to 255; 256 separates documents and stands before a prompt"}
    file = {"hf": "tokenizer.json", "sp": "tokenizer.model"}[kind]
    content = epath.Path(path).expanduser().read_bytes()
    (folder / file).write_bytes(content)
    if kind == "hf":
        added = json.loads(content).get("added_tokens") or []
        separator = next((token["content"] for token in added if token["id"] == tokenizer.document_id), None)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length}
        if separator is not None:
            settings |= {"bos_token": separator, "eos_token": separator}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return said | {"file": file, "rule": "document_id stands before a prompt"}


def _why_plain(config: Any, layout: str) -> str:
    from iha_jax.model.transformers_layout import why_not

    if layout not in ("auto", "plain", "transformers"):
        raise ValueError(f"--layout={layout}: expected auto, plain or transformers")
    why = "asked for" if layout == "plain" else why_not(config)
    if why and layout == "transformers":
        raise ValueError(f"--layout=transformers: no class of transformers computes this model: {why}")
    return why


def _check_output(output: str) -> Path:
    """Raises ValueError for a folder that holds something, or cannot be made."""
    from iha_jax.data.storage import is_local

    if not is_local(output):
        raise ValueError(f"--output={output}: expected a local folder; copy it to the bucket afterwards")
    folder = Path(output).expanduser().absolute()
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"--output={output}: is no folder; choose a name that does not exist")
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if found:
        raise ValueError(f"--output={output}: holds {', '.join(found[:5])}; choose an empty folder or another name")
    blocking = next((parent for parent in folder.parents if parent.exists() and not parent.is_dir()), None)
    if blocking is not None:
        raise ValueError(f"--output={output}: {blocking} is a file, so nothing can be made under it")
    return folder


@contextlib.contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name at the end, or after an error is gone."""
    scratch = folder.with_name(f".{folder.name}.incomplete.{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _safetensors() -> Any:
    try:
        import safetensors  # pyright: ignore[reportMissingImports]
        import safetensors.numpy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("exporting needs a library that is not installed: pip install 'iha_jax[export]'") from error
    return safetensors


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 2 refused input, else a failure."""
    parser = argparse.ArgumentParser(prog="python -m iha_jax.export", description="Write a checkpoint as safetensors.")
    parser.add_argument("--workdir", required=True, help="the run directory")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the last")
    parser.add_argument("--output", required=True, help="the folder to write; must be empty or not exist")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument(
        "--layout", default="auto", choices=("auto", "plain", "transformers"), help="auto: transformers where it fits"
    )
    flags = parser.parse_args(arguments)
    try:
        _safetensors()
        _check_output(flags.output)
        from iha_jax.evaluation.run import restore

        run = restore(flags.workdir, flags.step)
        written = export(run, flags.output, dtype=flags.dtype, layout=flags.layout)
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    why = f" ({written['why_plain']})" if written["why_plain"] else ""
    print(f"step {run.step} in {flags.output}: {written['layout']} layout{why}, {written['bytes']:,} bytes of weights")
    print("\n".join(f"  {name}" for name in written["files"]))
    sys.exit(0)


if __name__ == "__main__":
    main()
