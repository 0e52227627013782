"""`python -m iha_jax.training --config=configs/X.py[:arm] --workdir=DIR [--config.a.b=value ...]`, as `train.py`."""

from iha_jax.training.command import main

if __name__ == "__main__":
    main()
