"""One point, from its first epoch or its last checkpoint to its result on disk.

`<workdir>/<experiment>/<arm>/learning_rate=<r>/` holds `config.json`, and then `state.npz` (all seeds after some epoch)
until `result.json` takes its place. Each file is written whole or not at all.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from iha_jax.data.storage import check_library, read_json, tidy, write_text, writing
from iha_jax.relation_composition.training import Split, Trainable, data_of, evaluate, initial_state, make_epoch
from iha_jax.training.preemption import Preemption
from iha_jax.training.run_directory import RunDirectoryError, code_revision, flat

CONFIG, STATE, RESULT = "config.json", "state.npz", "result.json"
SAVE_SECONDS = 60.0  # between checkpoints; one is written on a signal too
HISTORY = ("train_loss", "validation_loss", "validation_accuracy", "validation_exact")

History = dict[str, list[np.ndarray]]  # of each epoch [S]; "active" says which seeds were still training


def check_points(folder: epath.Path, points: Sequence[Trainable]) -> None:
    """Refuses, writing nothing, a folder where one of these points was run with another config.

    Raises:
      RunDirectoryError: naming the first such point and the keys that differ.
    """
    check_library(folder)
    if folder.exists() and not folder.is_dir():
        raise RunDirectoryError(f"{folder}: is a file; expected a directory, or a name that does not exist")
    for point in points:
        file = folder / point.folder / CONFIG
        if file.exists():
            before, now = flat(read_json(file)), flat(json.loads(json.dumps(point.facts())))
            keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            if keys:
                changed = [f"  - {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in keys]
                raise RunDirectoryError("\n".join([f"{file.parent}: was run with another config:", *changed]))


def read_results(folder: epath.Path, points: Sequence[Trainable]) -> list[dict[str, Any]]:
    """The results of the points that are finished."""
    files = (folder / point.folder / RESULT for point in points)
    return [read_json(file) for file in files if file.exists()]


def run_point(
    folder: epath.Path,
    point: Trainable,
    splits: Mapping[str, Split],
    preemption: Preemption,
    tell: Callable[[str], None],
) -> bool:
    """Trains all seeds of a point until each has stopped, and writes its result. False when a signal came first: then
    the state is saved, and calling this again goes on from there, to the same result."""
    place = folder / point.folder
    if (place / RESULT).exists():
        return True
    place.mkdir(parents=True, exist_ok=True)
    tidy(place)
    write_text(place / CONFIG, json.dumps(point.facts(), indent=2) + "\n")
    train, validation = data_of(point, splits["train"]), data_of(point, splits["validation"])
    states, history, seconds = _restored(place / STATE, point)
    epoch = jax.jit(jax.vmap(make_epoch(point), in_axes=(0, None, None)))
    saved, done = time.monotonic(), len(history["active"])
    while done < point.experiment.epochs and _training(states, point):
        if preemption.requested(done):
            _save(place / STATE, states, history, seconds)
            return False
        began = time.monotonic()
        states, row = epoch(states, train, validation)
        row = {name: np.asarray(value) for name, value in row.items()}
        for name, values in history.items():
            values.append(row[name])
        done, seconds = done + 1, seconds + time.monotonic() - began
        tell(f"{point.folder}: epoch {done}, {time.monotonic() - began:.1f} s; {_describe(row)}")
        if time.monotonic() - saved > SAVE_SECONDS:
            _save(place / STATE, states, history, seconds)
            saved = time.monotonic()
    write_text(place / RESULT, json.dumps(_result(point, states, history, splits, seconds), indent=1) + "\n")
    (place / STATE).unlink(missing_ok=True)
    tidy(place)
    return True


def _training(states: dict[str, Any], point: Trainable) -> bool:
    return bool(np.any(np.asarray(states["patience"].waited) < point.experiment.patience))


def _describe(row: dict[str, np.ndarray]) -> str:
    accuracy = ", ".join(f"{value:.4f}" for value in row["validation_accuracy"])
    return f"validation accuracy {accuracy}; {int(row['active'].sum())} of {len(row['active'])} seeds training"


def _initial(point: Trainable) -> dict[str, Any]:
    seeds = point.first_seed + jnp.arange(point.experiment.seeds)
    return jax.jit(jax.vmap(lambda seed: initial_state(point, seed)))(seeds)


def _restored(file: epath.Path, point: Trainable) -> tuple[dict[str, Any], History, float]:
    """States of all seeds, rows so far and seconds spent; from the start when there is no checkpoint."""
    if not file.exists():
        return _initial(point), {name: [] for name in ("active", *HISTORY)}, 0.0
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: _initial(point)))
    with file.open("rb") as opened, np.load(opened) as stored:
        arrays = [stored[f"leaf_{i}"] for i in range(len(leaves))]
        history = {name: list(stored[f"history_{name}"]) for name in ("active", *HISTORY)}
        seconds = float(stored["seconds"])
    for array, leaf in zip(arrays, leaves, strict=True):
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            raise RunDirectoryError(
                f"{file}: holds {array.dtype}{array.shape} where {leaf.dtype}{leaf.shape} is expected; remove the file "
                f"to train this point from the start"
            )
    return jax.tree.unflatten(structure, [jnp.asarray(array) for array in arrays]), history, seconds


def _save(file: epath.Path, states: dict[str, Any], history: History, seconds: float) -> None:
    arrays = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(states))}
    arrays |= {f"history_{name}": np.asarray(values) for name, values in history.items()}
    with writing(file) as scratch, open(scratch, "wb") as opened:
        np.savez(opened, seconds=np.asarray(seconds), **arrays)  # type: ignore[arg-type]


def _result(
    point: Trainable, states: dict[str, Any], history: History, splits: Mapping[str, Split], seconds: float
) -> dict[str, Any]:
    """Lists have one item a seed. Test metrics are those of the parameters with the lowest validation loss."""
    test = data_of(point, splits["test"])
    measure = jax.jit(jax.vmap(lambda parameters: evaluate(point, parameters, test)))
    measured = {f"test_{name}": np.asarray(x).tolist() for name, x in measure(states["best_parameters"]).items()}
    active = np.asarray(history["active"])
    curves = {name: np.asarray(history[name]) for name in HISTORY}
    shapes = jax.eval_shape(lambda: point.initialize(jax.random.key(0)))
    return {
        **point.description(splits["test"]),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "seeds": np.asarray(states["seed"]).tolist(),
        "epochs": active.sum(0).tolist(),
        "best_validation_loss": np.asarray(states["patience"].best).tolist(),
        **measured,
        "history": {
            name: [curve[active[:, s], s].tolist() for s in range(active.shape[1])] for name, curve in curves.items()
        },
        "seconds": seconds,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "code": code_revision(),
    }
