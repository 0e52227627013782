"""The comparison in words: who is better, and everything that makes it less than a fair comparison."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from iha_jax.comparison.arms import Comparison
from iha_jax.comparison.results import Found, Result
from iha_jax.comparison.runs import Run
from iha_jax.comparison.table import Row
from iha_jax.config import as_dict
from iha_jax.training.run_directory import FREE, flat

PARAMETER_TOLERANCE, FLOPS_TOLERANCE = 0.01, 0.05
RATES = "learning rates"
DIGESTS = ("corpus_digest", "tokenizer_digest", "rows_digest")


def differences(rows: Sequence[Row], first: str) -> list[str]:
    """Each row against arm `first`, in bits per byte."""
    sentences = []
    for row in rows:
        difference = row.difference
        if difference is None:
            if row.arm != first:
                sentences.append(f"{row.label}: no difference, {first} has no finished run at the same setting.")
            continue
        what = f"{row.label} - {row.baseline} = {difference.mean:+.4f}"
        if difference.half_width is None:
            sentences.append(f"{what} bits per byte (n = {difference.n}): one seed, no interval, no verdict.")
            continue
        better = row.label if difference.mean < 0 else row.baseline
        verdict = f"{better} is better" if difference.distinguishable else "not distinguishable"
        sentences.append(f"{what} ± {difference.half_width:.4f} bits per byte (n = {difference.n}): {verdict}.")
    return sentences


def mismatches(rows: Sequence[Row]) -> list[str]:
    """Arms whose size or cost is not that of the first arm at the same setting; of several settings the largest gap."""
    gaps: dict[tuple[str, str], tuple[float, str]] = {}
    by_label = {row.label: row for row in rows}
    for row in rows:
        first = by_label.get(row.baseline)
        if first is None:
            continue
        for what, ratio, tolerance in (
            ("parameters", row.parameters.total / first.parameters.total, PARAMETER_TOLERANCE),
            ("useful FLOPs a token", row.flops.total / first.flops.total, FLOPS_TOLERANCE),
        ):
            if abs(ratio - 1) > max(tolerance, abs(gaps.get((row.arm, what), (0.0, ""))[0])):
                gaps[row.arm, what] = ratio - 1, first.arm
    return [
        f"{arm} has {gap:+.1%} {what} against {first}: the arms are not matched in {what}."
        for (arm, what), (gap, first) in gaps.items()
    ]


def seeds(rows: Sequence[Row]) -> list[str]:
    """Said when rows do not have the same seeds."""
    of = {row.label: ", ".join(str(r.run.seed) for r in row.results) for row in rows}
    if len(set(of.values())) == 1:
        return []
    listed = "; ".join(f"{label}: {numbers}" for label, numbers in of.items())
    return [f"The rows do not have the same seeds ({listed}); a difference is over the seeds that both have."]


def inconsistencies(results: Sequence[Result], comparison: Comparison) -> list[str]:
    """Warnings for everything but the model that differs between the runs, and for seeds of one setting that differ in
    the model. Not said: the length of the `longer` control, what a sweep sets, and what cannot change a result."""
    sentences = []
    settings = {r.run.folder: flat(as_dict(r.config)) for r in results}
    swept = {key for r in results for key, _ in r.run.settings}
    data_model = ("model.vocab_size", "model.context_length", "model.compute_dtype")
    for key in sorted({key for values in settings.values() for key in values}):
        if key in FREE or key == "seed" or (key.startswith("model.") and key not in data_model):
            continue
        if key in swept:
            continue
        values = {
            r.run.folder: settings[r.run.folder].get(key)
            for r in results
            if not (key == "training.steps" and r.run.arm == comparison.longer)
        }
        sentences += _differing(key, values)
    for name in DIGESTS:
        what = f"{name}: they were not trained on the same data; it is"
        sentences += _differing(what, {r.run.folder: r.provenance.get(name) for r in results})
    for setting in dict.fromkeys(r.run.setting for r in results):
        group = [r for r in results if r.run.setting == setting]
        for key in settings[group[0].run.folder]:
            if key.startswith("model.") and key not in data_model:
                sentences += _differing(key, {r.run.folder: settings[r.run.folder].get(key) for r in group})
    for result in results:
        if result.config.seed != result.run.seed:
            sentences.append(f"WARNING: {result.run.folder} was trained with seed {result.config.seed}.")
    return sentences


def devices(results: Sequence[Result]) -> list[str]:
    """What the runs ran on; said when it was not the same for all, since tokens/s and memory then do not compare."""
    places = {r.run.folder: [f"{s.get('device_count')} x {s.get('device_kind')}" for s in r.starts] for r in results}
    kinds = {folder: " then ".join(dict.fromkeys(found)) or "not noted" for folder, found in places.items()}
    if len(set(kinds.values())) == 1:
        started = min((s["started"] for r in results for s in r.starts if "started" in s), default="not noted")
        return [f"Device: {next(iter(kinds.values()))}; first run started {started}."]
    return _differing("device, so that tokens/s and memory do not compare", kinds)


def left_out(found: Found, comparison: Comparison) -> list[str]:
    """What the table does not hold."""
    missing = [folder for folder in found.missing if not folder.startswith(f"{comparison.longer}/")]
    unfinished = [r.run.folder for r in found.results if not r.finished]
    diverged = [r.run.folder for r in found.results if r.finished and r.diverged]
    return [
        f"{what}: {', '.join(folders)}."
        for what, folders in (
            ("Diverged (the final loss is no number), and left out", diverged),
            ("Not finished, and left out", unfinished),
            ("Not started", missing),
            ("WARNING: cannot be read, and left out", found.unreadable),
            ("In the workdir, but no run of this comparison, and left out", found.foreign),
        )
        if folders
    ]


def choice(rows: Sequence[Row], best: Sequence[Row], runs: Sequence[Run]) -> list[str]:
    """What "best of" means, and, where `runs` differ in the learning rate alone, arms that are best at its edge."""
    what, rates = swept_name(runs), sorted({run.learning_rate for run in runs if run.learning_rate is not None})
    sentences = [
        f"Best of: each arm at whichever of its {what} ended lowest, so these numbers are optimistic, about equally "
        f"for arms with equally many {what}."
    ]
    if what == RATES and len(rates) > 2:
        for row in best:
            rate = row.results[0].run.learning_rate
            if rate in (rates[0], rates[-1]):
                sentences.append(f"{row.arm} is best at the edge of its sweep ({rate:g}): its optimum may lie outside.")
    tried = {row.arm: sum(other.arm == row.arm for other in rows) for row in rows}
    if len(set(tried.values())) > 1:
        listed = ", ".join(f"{arm}: {count}" for arm, count in tried.items())
        sentences.append(f"The arms have finished runs at different numbers of {what} ({listed}).")
    return sentences


def swept_name(runs: Sequence[Run]) -> str:
    """What the runs of one arm differ in, the seed apart: learning rates, settings in general, or nothing ("")."""
    keys = {key for run in runs for key, _ in run.settings}
    return "" if not keys else RATES if keys == {"optimizer.learning_rate"} else "settings"


def _differing(what: str, values: Mapping[str, Any]) -> list[str]:
    """One sentence with the runs of each value, nothing when all have the same. `arm` stands for all its seeds."""
    folders: dict[str, list[str]] = {}
    for folder, value in values.items():
        folders.setdefault(repr(value) if not isinstance(value, str) else value, []).append(folder)
    if len(folders) < 2:
        return []
    listed = "; ".join(f"{value} in {', '.join(_by_arm(names, values))}" for value, names in folders.items())
    return [f"WARNING: the runs differ in {what}: {listed}."]


def _by_arm(names: Sequence[str], everything: Iterable[str]) -> list[str]:
    """`arm/seed0`, `arm/seed1`, ... as `arm` where `names` has all of `everything` that begins so."""
    whole = Counter(name.rpartition("/")[0] for name in everything)
    own = Counter(name.rpartition("/")[0] for name in names)
    found = (name.rpartition("/")[0] for name in names)
    return list(dict.fromkeys(arm if own[arm] == whole[arm] else name for arm, name in zip(found, names, strict=True)))
