"""The `loss` task: how well a trained model predicts the rows that its training was validated on."""

import math

import jax
import numpy as np
from scipy import stats

from iha_jax.data.corpus import open_validation_rows
from iha_jax.evaluation.perplexity import evaluate
from iha_jax.evaluation.run import RunModel
from iha_jax.evaluation.tasks import Options, TaskResult
from iha_jax.parallel.mesh import check_batch_sizes
from iha_jax.parallel.processes import in_turns
from iha_jax.training.step import jit_eval_step


def loss_task(model: RunModel, options: Options) -> TaskResult:
    """Loss (nats a token) and bits per byte on the rows that the training run was validated on, and the loss of tokens
    by how much they can see. Intervals are over rows; a record is a row.

    `loss_from_<n>` is the mean loss of the tokens that are predicted from n to 2n - 1 tokens of their document (of the
    row, where attention may cross documents).

    Raises:
      ValueError: for rows that cannot be opened, or hold no counted token.
    """
    run, config = model.run, model.run.config
    check_batch_sizes(config, run.mesh)
    rows = in_turns(lambda: open_validation_rows(config, model.tokenizer), lambda rows: {"rows": rows.digest})
    count = config.training.eval_rows if options.eval_rows is None else options.eval_rows
    with jax.set_mesh(run.mesh):
        sums = evaluate(
            jit_eval_step(config, run.mesh),
            run.parameters,
            rows,
            model.tokenizer.byte_lengths,
            run.mesh,
            batch_size=config.training.eval_batch_size,
            num_rows=count or None,
        )
    metrics = {"loss": sums.loss, "bits_per_byte": sums.bits_per_byte}
    for place, tokens in enumerate(sums.reach_tokens):
        if tokens:
            metrics[f"loss_from_{2**place}"] = float(sums.reach_nll[place] / tokens)
    intervals = {
        "loss": ratio_interval(sums.nll, sums.tokens),
        "bits_per_byte": ratio_interval(sums.nll, sums.text_bytes * math.log(2)),
    }
    columns = zip(sums.rows, sums.nll, sums.tokens, sums.text_bytes, strict=True)
    records = [{"row": int(r), "nll": float(x), "tokens": int(n), "bytes": int(b)} for r, x, n, b in columns]
    settings = {"rows": len(records), "tokens": int(sums.tokens.sum()), "rows_digest": rows.digest}
    return TaskResult(metrics, intervals, settings, records, dict.fromkeys(metrics, len(records)))


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
    """95 % interval of `sum(numerators) / sum(denominators)` over n independent rows; NaN for n = 1.

    The ratio's linearization (delta method): `r ± t_{0.975, n-1} s / (sqrt(n) mean(denominators))`, `s` the standard
    deviation of `numerators - r * denominators`.
    """
    n, ratio = len(numerators), float(numerators.sum() / denominators.sum())
    if n == 1:
        return math.nan, math.nan
    spread = float(np.std(numerators - ratio * denominators, ddof=1)) / (math.sqrt(n) * float(denominators.mean()))
    half = float(stats.t.ppf(0.975, n - 1)) * spread
    return ratio - half, ratio + half
