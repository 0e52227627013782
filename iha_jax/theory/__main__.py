"""`python -m iha_jax.theory [--out[=FILE.png]]`: every statement about IHA, checked by running its construction.

Prints pass or FAIL for each, then heads and parameters against k and N_max. `--out` draws these, to
docs/images/theory.png unless a file is named. Everything is computed in float64.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from iha_jax.theory import cpm3_statements, growth, polynomial_filters, superset
from iha_jax.training.command import refuse

STATEMENTS = (*superset.STATEMENTS, *polynomial_filters.STATEMENTS, *cpm3_statements.STATEMENTS)
PICTURE = "docs/images/theory.png"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 every statement holds, 1 one does not, 2 refused input."""
    parser = argparse.ArgumentParser(prog="python -m iha_jax.theory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", nargs="?", const=PICTURE, default="", help=f"draw the growth ({PICTURE})")
    out = parser.parse_args(arguments).out
    if out and (Path(out).is_dir() or not Path(out).parent.is_dir()):
        refuse(ValueError(f"--out={out}: expected a file in a folder that exists"))
    began, failed = time.monotonic(), 0
    for statement in STATEMENTS:
        outcome = statement.outcome()
        failed += not outcome.holds
        print(f"{'pass' if outcome.holds else 'FAIL'}  {statement.claim}\n      {outcome.evidence}", flush=True)
    print(f"\n{len(STATEMENTS) - failed} of {len(STATEMENTS)} hold, {time.monotonic() - began:.0f} s\n")
    print(growth.table())
    if out:
        growth.draw(Path(out))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
