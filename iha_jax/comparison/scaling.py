"""Loss against size: power laws through the runs of a comparison that trains each arm at several sizes.

Of each arm and seed `b(x) = A x^-beta`, least squares on `log b` over the sizes, x the parameters or the useful
training FLOPs, b bits per byte. There is no irreducible loss in it: the law holds over the sizes it was fitted to, no
further.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from iha_jax.accounting import count_parameters
from iha_jax.comparison.figure import COLORS
from iha_jax.comparison.results import Result
from iha_jax.comparison.runs import Run
from iha_jax.comparison.statistics import Estimate, estimate, paired_difference
from iha_jax.comparison.table import Row

TITLE = "Scaling"
LEAST_SIZES = 3
NOTES = (
    "Power laws b = A x^-beta of bits per byte, fitted for each seed to its runs of all sizes, without an irreducible "
    "loss; ± is the half-width of a 95 % Student-t interval over seeds, behind a semicolon the difference to the first "
    "arm. Where tokens grow with parameters, an exponent is of both. Deviation: the largest of a run from its seed's "
    "fit against FLOPs. Compute saved: useful training FLOPs of the first arm's largest run over those at which the "
    "arm, by its fit, has the same loss, for seeds where that lies between its smallest and largest run; geometric "
    "mean and interval, which knows the spread of seeds and not the fit's error; above 1 the arm needs less."
)
HEADER = ("arm", "sizes", "beta (parameters)", "beta (FLOPs)", "deviation", "compute saved")


@dataclass(frozen=True)
class PowerLaw:
    """`b(x) = exp(intercept) * x ** -beta`."""

    intercept: float
    beta: float

    def __call__(self, x: float) -> float:
        return math.exp(self.intercept - self.beta * math.log(x))

    def inverse(self, b: float) -> float:
        """The x at which it reaches b."""
        return math.exp((self.intercept - math.log(b)) / self.beta)


def fit(x: Sequence[float], b: Sequence[float]) -> PowerLaw:
    """Least squares of `log b` on `log x`. Raises ValueError for fewer than two different x."""
    if len(set(x)) < 2:
        raise ValueError(f"a power law needs two different sizes, found {sorted(set(x))}")
    slope, intercept = np.polyfit(np.log(x), np.log(b), 1)
    return PowerLaw(float(intercept), -float(slope))


@dataclass(frozen=True)
class Scaling:
    """One arm over its sizes: rows from the smallest to the largest, and by seed the fits against parameters and
    against FLOPs. Seeds that lack a size are left out."""

    arm: str
    rows: list[Row]
    by_parameters: dict[int, PowerLaw]
    by_flops: dict[int, PowerLaw]

    def runs(self, seed: int) -> list[Result]:
        return [result for row in self.rows for result in row.results if result.run.seed == seed]

    @property
    def deviation(self) -> float:
        """The largest relative deviation of a run from its seed's fit against FLOPs."""
        return max(
            abs(run.final["bits_per_byte"] / law(run.final["flops"]) - 1)
            for seed, law in self.by_flops.items()
            for run in self.runs(seed)
        )


def over_sizes(runs: Sequence[Run]) -> bool:
    """Whether a comparison is one over sizes: each arm's settings are three models or more, all of other sizes."""
    sizes: dict[str, dict[str, int]] = {}
    for run in runs:
        own = sizes.setdefault(run.arm, {})
        if run.setting not in own:
            own[run.setting] = count_parameters(run.config().model).total
    return all(len(own) >= LEAST_SIZES and len(set(own.values())) == len(own) for own in sizes.values())


def measured(rows: Sequence[Row]) -> list[Scaling]:
    """The arms of a comparison over sizes; empty unless every arm has finished three sizes or more in one seed."""
    found = []
    for arm in dict.fromkeys(row.arm for row in rows):
        own = sorted((row for row in rows if row.arm == arm), key=lambda row: row.parameters.total)
        sizes = [row.parameters.total for row in own]
        if len(sizes) < LEAST_SIZES or len(set(sizes)) < len(sizes):
            return []
        seeds = set.intersection(*({result.run.seed for result in row.results} for row in own))
        runs = {seed: [r for row in own for r in row.results if r.run.seed == seed] for seed in sorted(seeds)}
        if not runs:
            return []
        bits = {seed: [r.final["bits_per_byte"] for r in of] for seed, of in runs.items()}
        by_flops = {seed: fit([r.final["flops"] for r in of], bits[seed]) for seed, of in runs.items()}
        found.append(Scaling(arm, own, {seed: fit(sizes, b) for seed, b in bits.items()}, by_flops))
    return found


def compute_saved(arm: Scaling, first: Scaling) -> dict[int, float]:
    """By seed: FLOPs of the largest run of `first` over those at which the fit of `arm` has that run's loss. Seeds for
    which these lie outside the FLOPs of the arm's own runs are left out: a fit says nothing there."""
    ratios = {}
    for seed in sorted(arm.by_flops.keys() & first.by_flops.keys()):
        last, own = first.runs(seed)[-1].final, [run.final["flops"] for run in arm.runs(seed)]
        law = arm.by_flops[seed]
        if law.beta > 0 and own[0] <= (needed := law.inverse(last["bits_per_byte"])) <= own[-1]:
            ratios[seed] = last["flops"] / needed
    return ratios


def scaling_table(arms: Sequence[Scaling]) -> list[list[str]]:
    """Header and a line an arm, the fits' exponents with their difference to the first arm's."""
    lines: list[list[str]] = [[*HEADER]]
    first = arms[0]
    for arm in arms:
        sizes = f"{arm.rows[0].parameters.total:,} to {arm.rows[-1].parameters.total:,} ({len(arm.rows)})"
        exponents = [_exponent(arm, first, lambda s: s.by_parameters), _exponent(arm, first, lambda s: s.by_flops)]
        gain = "-" if arm is first else _factor(compute_saved(arm, first))
        lines.append([arm.arm, sizes, *exponents, f"{arm.deviation:.1%}", gain])
    return lines


def _exponent(arm: Scaling, first: Scaling, laws: Callable[[Scaling], dict[int, PowerLaw]]) -> str:
    own = {seed: law.beta for seed, law in laws(arm).items()}
    text = estimate(list(own.values())).text()
    if arm is first:
        return text
    difference = paired_difference(own, {seed: law.beta for seed, law in laws(first).items()})
    if difference is None:
        return text
    interval = "" if difference.half_width is None else f" ± {difference.half_width:.4f}"
    return f"{text}; {difference.mean:+.4f}{interval}"


def _factor(ratios: dict[int, float]) -> str:
    """Geometric mean and its interval."""
    if not ratios:
        return "-"
    logs = estimate([math.log(ratio) for ratio in ratios.values()])
    if logs.half_width is None:
        return f"{math.exp(logs.mean):.2f} (n=1, no interval)"
    low, high = math.exp(logs.mean - logs.half_width), math.exp(logs.mean + logs.half_width)
    return f"{math.exp(logs.mean):.2f} [{low:.2f}, {high:.2f}] (n={logs.n})"


def draw_scaling(arms: Sequence[Scaling], path: epath.Path) -> None:
    """Bits per byte against parameters and against useful training FLOPs: means with intervals, each arm's mean law."""
    figure = Figure(figsize=(10.5, 4.4), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for number, arm in enumerate(arms):
        color, means = COLORS[number % len(COLORS)], [row.bits_per_byte for row in arm.rows]
        parameters = [float(row.parameters.total) for row in arm.rows]
        flops = [row.results[0].final["flops"] for row in arm.rows]
        for panel, x, laws in zip(panels, (parameters, flops), (arm.by_parameters, arm.by_flops), strict=True):
            line = np.geomspace(x[0], x[-1], 50)
            fitted = np.exp(np.mean([[math.log(law(value)) for value in line] for law in laws.values()], axis=0))
            panel.plot(line, fitted, color=color, lw=1.4)
            label = f"{arm.arm} (n={len(laws)})"
            _points(panel, x, means, color, label)
    for panel, label in zip(panels, ("parameters", "useful training FLOPs"), strict=True):
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel(label)
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("bits per byte")
    panels[-1].legend(frameon=False)
    figure.suptitle(
        "Final validation loss: mean over seeds, its 95 % interval, power law fitted to each seed", fontsize=10
    )
    with path.open("wb") as file:
        figure.savefig(file, format="png")


def _points(panel: Axes, x: Sequence[float], means: Sequence[Estimate], color: str, label: str) -> None:
    errors = [mean.half_width or 0.0 for mean in means]
    panel.errorbar(x, [m.mean for m in means], yerr=errors, color=color, label=label, marker="o", ls="", capsize=3)
