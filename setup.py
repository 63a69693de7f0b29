"""All metadata of the package; pyproject.toml only configures the build and the tools."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
README = HERE / "README.md"


def version() -> str:
    source = (HERE / "posattn" / "__init__.py").read_text("utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', source, re.M)
    if found is None:
        raise RuntimeError('posattn/__init__.py has no line __version__ = "..."')
    return found.group(1)


setup(
    name="posattn",
    version=version(),
    description="Fused attention with learned positional biases: O(N) memory, forward and backward",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords=["attention", "positional encoding", "TISA", "ALiBi", "T5", "KERPLE", "Triton", "PyTorch"],
    # posattn/kernels is a link to ../kernels, which has no __init__.py on purpose: with one, the folder would
    # hide the distribution named `kernels` from everything that runs in the project's root, builds included.
    packages=[
        "posattn",
        "posattn.biases",
        "posattn.distributed",
        "posattn.floater",
        "posattn.integrations",
        "posattn.integrations.transformers",
        "posattn.kernels",
    ],
    package_data={"posattn": ["py.typed"]},
    python_requires=">=3.10,<3.14",
    # No upper bounds: torch pins its own Triton, so a fresh install always gets a pair that belongs together.
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
        "torchdiffeq>=0.2.5",
    ],
    extras_require={
        "plot": ["matplotlib>=3.8"],
        "transformers": ["transformers>=4.57"],
        "bench": ["matplotlib>=3.8", "rich>=13"],
        "test": [
            "accelerate>=1",  # for transformers.Trainer
            "hypothesis>=6.100",
            "numpy>=1.26",  # Triton's interpreter needs it, and below 2.4 with Triton 3.6
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "setuptools>=77",  # the wheel is built by a test
            "transformers>=4.57",
        ],
        "lint": ["mypy>=1.15", "ruff>=0.12"],
    },
)
