"""Values and names as JSON, file systems and W&B take them."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from typing import Any


def safe_name(text: str) -> str:
    """`text` with only letters, digits and `_.-`: fit for files, run ids and artifacts."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "unnamed"


def plain(value: Any) -> Any:
    """`value` for JSON: keys become strings, numbers of any library Python's, nan and inf None, the rest text."""
    match value:
        case None | bool() | str():
            return value
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            number = float(value)
            return number if math.isfinite(number) else None
    return str(value)


def without_dots(value: Any) -> Any:
    """W&B reads a dot in a config key as nesting."""
    if isinstance(value, dict):
        return {key.replace(".", "_"): without_dots(item) for key, item in value.items()}
    return [without_dots(item) for item in value] if isinstance(value, list) else value


def artifact_name(name: str) -> tuple[str, str | None]:
    """`code@v3` as W&B's artifact `code` with the alias `local-v3`: plain `v3` is a word that W&B keeps for itself."""
    artifact, _, version = name.partition("@")
    return safe_name(artifact), f"local-{safe_name(version)}" if version else None
