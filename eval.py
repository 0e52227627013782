"""Evaluate a run: `python eval.py --workdir=runs/base [--step=N] [--tasks=loss,sample] [--out=FILE]`."""

from iha_jax.evaluation.command import main

if __name__ == "__main__":
    main()
