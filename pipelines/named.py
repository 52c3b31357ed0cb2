"""What the settings of a stage name is looked for before anything slow is imported: torch alone takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from proxytune.settings import Steering

    T = TypeVar("T", bound=Steering)


def load(kind: type[T], values: Mapping[str, Any]) -> T:
    """The settings of a stage that steers. Raises RegistryError where its expert is not registered."""
    from proxytune import settings
    from proxytune.experts.registry import Registry

    found = settings.load(kind, values)
    Registry(found.outputs / "registry").resolve(found.expert)
    return found
