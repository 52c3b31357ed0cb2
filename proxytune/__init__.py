"""Decoding-time steering of language models: steered = base + alpha * (expert - anti)."""

__version__ = "0.1.0"
