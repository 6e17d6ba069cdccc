"""stacking_ds: progressive-stacking pre-training of BERT-style encoders on DeepSpeed."""

from pathlib import Path

from setuptools import find_packages, setup

# Ranges say what the code needs; constraints.txt pins what it was tested with.
REQUIREMENTS = [
    "deepspeed==0.19.8",  # ZeRO engine; stacking_ds.engine.zero reads this version's private layout
    "torch>=2.11,<2.14",  # tensors, torch.distributed, SDPA, AdamW
    "datasets>=4",  # `stacking-ds prepare hf:NAME` reads any Hugging Face dataset
    "tokenizers>=0.21",  # WordPiece training and encoding
    "transformers>=5,<6",  # config and tokenizer files of the exported folder
    "sentencex>=1.0.32,<2",  # sentence boundaries, which the NSP pairs are cut at
    "pyarrow>=15",  # token shards are memory-mapped Arrow files; reads Parquet
    # checkpoints; before 0.8 writing one copied it and stopped every other thread meanwhile
    "safetensors>=0.8",
    "xxhash>=3.4",  # checksums of a checkpoint's chunks, as fast as memory; datasets brings it too
    "filelock>=3.12",  # one process of a node lays out rows; datasets brings it too
    "psutil>=5.9",  # `bench data` watches the processes it starts; deepspeed brings it too
    "pydantic>=2.10,<3",  # recipes and manifests are strict models; DeepSpeed brings it too
    "PyYAML>=6",  # recipes are YAML
    "numpy>=1.26",  # token arrays, masks, sample order
    "tensorboard>=2.16",  # what people watch while it trains
    "tqdm>=4.66",  # progress bars
    "mpi4py>=4.1",  # under mpirun, ranks find one another through it (wheel, no compiler)
]
DEVELOPMENT = [
    "pytest>=8",
    "pytest-xdist>=3.6",  # tests in as many processes as there are cores, two by default
    "pytest-timeout>=2.3",  # a multi-rank test must not hang the run
    "triton>=3.6; platform_system == 'Linux'",  # kernels in its interpreter; torch for CUDA has it
    "hypothesis>=6.100",  # property tests of the schedules, the data order and the planner
    "ruff>=0.15",
    "mypy>=1.15",
    "types-PyYAML",
    "types-tqdm",
]

setup(
    name="stacking_ds",
    version="0.1.0",
    description=__doc__.partition(": ")[2].strip(),
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    install_requires=REQUIREMENTS,
    extras_require={"dev": DEVELOPMENT},
    packages=[
        *find_packages(include=["stacking_ds", "stacking_ds.*"]),
        "stacking_ds.ds_configs",
        "stacking_ds.slurm",
    ],
    # recipes, DeepSpeed JSONs and batch scripts live at the top level and travel inside the package
    package_dir={"stacking_ds.ds_configs": "ds_configs", "stacking_ds.slurm": "slurm"},
    package_data={
        "stacking_ds": ["py.typed"],
        "stacking_ds.ds_configs": ["*.json", "recipes/*.yaml"],
        "stacking_ds.slurm": ["*.sbatch", "*.sh", "README.md"],
    },
    entry_points={"console_scripts": ["stacking-ds = stacking_ds.cli:main"]},
)
