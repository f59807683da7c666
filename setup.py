"""Install peft_jax; ``run.py``, ``configs/`` and ``experiments/`` are used from a clone of the repository."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

# The lower ends are those of .ci/stacks/oldest.txt, which all tests pass with; there is an upper end only where a break
# was seen.
REQUIRES = [
    "jax>=0.10",
    "flax>=0.12.2",  # 0.12.0 asks jax.checkpoint for an option that jax 0.10 no longer has
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11.30",
    "chex>=0.1.91",
    "numpy>=2.0.2",
    "transformers>=5.0",
    "datasets>=4.0",
    "huggingface_hub>=1.3",
    "safetensors>=0.5.3",
    "filelock>=3.16",
    "gguf>=0.17.1",
    "absl-py>=2.3.1",
    "ml_collections>=1.0",
    "tensorboardX>=2.6.2",
    "tqdm>=4.66.6",
    "matplotlib>=3.10",
    "pandas>=2.2.3",
    "scipy>=1.14.1",
    "Jinja2>=3.1.4",
    "MarkupSafe>=2.1.5",
    "regex>=2025.10.22",  # which transformers needs, too
]

EXTRAS = {
    "cuda12": ["jax[cuda12]>=0.10"],
    "cuda13": ["jax[cuda13]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
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
