"""Install peft_jax; ``run.py``, ``configs/`` and ``experiments/`` are used from a clone of the repository."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

# The lower end is what it was tested with; an upper end is the next version that may break it.
REQUIRES = [
    "jax>=0.10.2,<0.11",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "chex>=0.1.92,<0.2",
    "numpy>=2.4,<3",
    "transformers>=5.23,<6",
    "datasets>=5.2,<6",
    "huggingface_hub>=2.4,<3",
    "safetensors>=0.8,<1",
    "filelock>=4.3,<5",
    "gguf>=0.19,<0.20",
    "absl-py>=2.5,<3",
    "ml_collections>=1.1,<2",
    "tensorboardX>=2.6.5,<3",
    "tqdm>=4.70,<5",
    "matplotlib>=3.10,<4",
    "pandas>=3.1.1",
    "scipy>=1.17.1",
    "Jinja2>=3.1.6",
    "MarkupSafe>=3.0.4",
]

EXTRAS = {
    "cuda12": ["jax[cuda12]>=0.10.2,<0.11"],
    "tpu": ["jax[tpu]>=0.10.2,<0.11"],
    # torch and peft are the references that the tests compare with; nothing in the package imports them.
    "test": ["pytest>=9,<10", "pytest-xdist>=3.8,<4", "ruff>=0.17,<0.18", "pyright[nodejs]>=1.1.414",
             "torch==2.13.0", "peft>=0.21.2,<0.22",
             "accelerate>=1.15,<2", "bitsandbytes>=0.50,<0.51",
             "selenium>=4.51,<5",  # the HTML report is looked at in Debian's chromium
             "transformers<5.24"],  # with 5.24 peft 0.21's generate() loses its virtual tokens
    "dev": ["ruff>=0.17,<0.18", "pre-commit>=4,<5"],
}

setup(
    name="peft_jax",
    version="0.1.0",
    description="Parameter-efficient fine-tuning of pretrained language models in JAX and Flax",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["peft_jax", "peft_jax.*"]),
    package_data={"peft_jax": ["py.typed"], "peft_jax.studies.comparison": ["*.jinja"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
