"""Hydra's composing, with a look at what comes out before Hydra acts upon it.

Of its own settings Hydra makes objects and environment variables, before any stage sees a value. A file of somebody
else's can reach them (`# @package _global_`), so what they hold beyond our own choices is refused, at every composing:
of a run, of a multirun and of each of its jobs, in whichever process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from proxytune.errors import SettingsError


class Loader(ConfigLoaderImpl):
    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        config = super().load_configuration(*args, **kwargs)
        try:
            found = next(_acting(config.hydra), None)
        except OmegaConfBaseException as error:
            raise SettingsError(str(error).splitlines()[0]) from error
        if found:
            raise SettingsError(
                f"{found} is set: no configuration makes objects or environment variables",
                "leave it out, and look at what else is in the file that sets it",
            )
        return config


def _acting(hydra: DictConfig) -> Iterator[str]:
    """The settings of Hydra that would do more than choose; interpolations are followed."""
    if hydra.callbacks:
        yield "hydra.callbacks"
    if set(hydra.job.env_set) - set(hydra.job.env_copy):
        yield "hydra.job.env_set"
    for name in ("hydra_logging", "job_logging"):
        if hydra[name] and hydra[name].get("root") is not None:  # else nothing of it is looked at
            yield f"hydra.{name}"
    for name in ("launcher", "sweeper"):  # their own class must be a plugin of Hydra, which sees to that itself
        values: Any = OmegaConf.to_container(hydra[name], resolve=True) if hydra[name] else {}
        if any(map(_makes, values.values())):
            yield f"_target_ below hydra.{name}"


def _makes(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(map(_makes, value.values()))
    return isinstance(value, list) and any(map(_makes, value))
