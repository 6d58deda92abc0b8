"""Packaging; everything else about the project is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

setup(
    name="dense-prediction-transformers",
    version="0.1.0",
    description="Dense Prediction Transformers for depth and segmentation, with fused Triton kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    # The folder kernels/ is installed as dpt.kernels: a top-level package of that name would shadow Hugging Face's `kernels`.
    packages=["dpt", "dpt.checkpoints", "dpt.kernels"],
    package_dir={"dpt": "dpt", "dpt.kernels": "kernels"},
    package_data={"dpt": ["weights/*", "examples/*"], "dpt.kernels": ["configs/*.json"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "pillow",
        "safetensors",
        "huggingface_hub",
        "tqdm",
        "filelock",
        "matplotlib",
    ],
    extras_require={
        "xformers": ["xformers"],
        "train": ["pybullet", "torchmetrics"],
        "hf": ["transformers"],
        "heic": ["pillow-heif"],
        "test": ["pytest", "pytest-xdist", "transformers", "torchmetrics", "pybullet", "pillow-heif", "ruff"],
        "bench": ["pytest", "pytest-benchmark", "transformers"],
    },
    entry_points={"console_scripts": ["dpt=dpt.commands.main:main"]},
)
