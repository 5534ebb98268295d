"""opensloth: a training config in, a fine-tuned model out. Importing the package imports nothing else."""

__version__ = "0.1.0"
