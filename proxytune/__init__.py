"""Decoding-time steering of language models: steered = base + alpha * (expert - anti)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
