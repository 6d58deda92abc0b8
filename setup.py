"""Packaging; everything else about the project is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# The folder kernels/ is installed as dpt.kernels: a top-level package of that name would shadow Hugging Face's `kernels`. Its tools, which
# tune, compile and check the kernels, need a checkout, and stay there.
KERNELS = ["dpt.kernels", *(f"dpt.kernels.{name}" for name in find_packages("kernels", exclude=["tools", "tools.*"]))]

setup(
    name="dense-prediction-transformers",
    version="0.1.0",
    description="Dense Prediction Transformers for depth and segmentation, with fused Triton kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10,<3.14",
    packages=[*find_packages(include=["dpt", "dpt.*"]), *KERNELS],
    package_dir={"dpt": "dpt", "dpt.kernels": "kernels"},
    package_data={"dpt": ["py.typed", "weights/*", "examples/*"], "dpt.kernels": ["configs/*.json", "cpu/avx*.json"]},
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
        "train": ["albumentations", "tensorboard"],
        "render": ["pybullet"],
        "ray": ["ray[data]"],
        "hf": ["transformers>=5.0"],
        "heic": ["pillow-heif"],
        "points": ["trimesh"],
        "video": ["av"],
        "test": [
            "mypy",
            "tomli; python_version < '3.11'",
            "pytest",
            "pytest-xdist",
            "transformers",
            "accelerate",
            "peft",
            "torchmetrics",
            "albumentations",
            "tensorboard",
            "ray[data]",
            "pybullet",
            "pillow-heif",
            "trimesh",
            "pygltflib",
            "av",
            "ruff",
        ],
        "bench": ["pytest", "pytest-benchmark", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino"],
    },
    entry_points={"console_scripts": ["dpt=dpt.commands.main:main"]},
)
