"""`python -m iha_jax.evaluation --workdir=DIR [--tasks=...]`, as `eval.py`."""

from iha_jax.evaluation.command import main

if __name__ == "__main__":
    main()
