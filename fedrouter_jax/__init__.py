"""FedRouter and its baselines as pure JAX functions: one LoRA adapter per task, found by clustering."""

__version__ = "0.1.0"
