"""Train one model: `python train.py --config=configs/base.py --workdir=runs/base`."""

from iha_jax.training.command import main

if __name__ == "__main__":
    main()
