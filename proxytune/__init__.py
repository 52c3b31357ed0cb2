"""Decoding-time steering of language models: steered = base + alpha * (expert - anti)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# TRL tells the hub of each trainer that is made, unless this is set before the hub's client is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# transformers sends a model that has pickled weights only, and the user's token, to a service that converts it.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

if TYPE_CHECKING:
    from proxytune.api import Remote, Steered, load
    from proxytune.decoding.processor import ProxyTuningLogitsProcessor

__version__ = "0.1.0"
__all__ = ["ProxyTuningLogitsProcessor", "Remote", "Steered", "load"]


def __getattr__(name: str) -> Any:
    """The Python surface, imported when used: it brings torch and transformers, the command's help must not."""
    if name == "ProxyTuningLogitsProcessor":
        from proxytune.decoding import processor

        return processor.ProxyTuningLogitsProcessor
    if name in __all__:
        from proxytune import api

        return getattr(api, name)
    raise AttributeError(f"module 'proxytune' has no attribute {name!r}")
