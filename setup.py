from pathlib import Path

from setuptools import setup

setup(
    name="pid_diffusers",
    version="0.1.0",
    description="Physics Informed Distillation for diffusers: one-step students of diffusion models.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "pid_diffusers",
        "pid_diffusers.converters",
        "pid_diffusers.demo",
        "pid_diffusers.denoisers",
        "pid_diffusers.evaluation",
        "pid_diffusers.hub",
        "pid_diffusers.losses",
        "pid_diffusers.model_cards",
        "pid_diffusers.models",
        "pid_diffusers.pipelines",
        "pid_diffusers.schedulers",
        "pid_diffusers.text",
        "pid_diffusers.training",
    ],
    package_dir={"pid_diffusers.model_cards": "model_cards", "pid_diffusers.pipelines": "pipelines"},
    package_data={
        "pid_diffusers": ["presets/*.yaml", "assets/*/*", "assets/*/*/*"],
        "pid_diffusers.evaluation": ["digit_features.safetensors"],
        "pid_diffusers.losses": ["digit_lpips.safetensors"],
        "pid_diffusers.model_cards": ["*.jinja"],
    },
    install_requires=[
        "torch>=2.6",
        # loading relies on how diffusers finds classes outside its own package
        "diffusers>=0.42,<0.43",
        "transformers>=5.0",
        "accelerate>=1.1",
        "datasets>=3.0",
        "huggingface_hub>=1.32",
        "jinja2>=3.1",
        "peft>=0.13",
        "lpips>=0.1.4",
        "safetensors>=0.4",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "psutil>=5.9",
        "pyyaml>=6.0",
        "scikit-learn>=1.4",
        "tensorboard>=2.16",
        "tqdm>=4.66",
    ],
    entry_points={"console_scripts": ["pid-diffusers = pid_diffusers.cli:main"]},
    extras_require={
        # --optimizer adamw_8bit
        "8bit": ["bitsandbytes>=0.43"],
        "demo": ["gradio>=6.31,<7"],
        # pid-diffusers evaluate
        "evaluation": ["torch-fidelity>=0.4", "torchvision>=0.21"],
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "parameterized>=0.9",
            "requests-mock>=1.12",
            "ruff>=0.14",
            # the page and the browser that looks at it; Chromium itself is the system's
            "gradio>=6.31,<7",
            "playwright>=1.50",
            # evaluate, and the second opinion on its arithmetic
            "torch-fidelity>=0.4",
            "torchmetrics>=1.6",
            "torchvision>=0.21",
        ],
    },
)
