"""Hydra's refusals in one line: what was given, and what was probably meant."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Generator
from typing import Any

from pipelines.guide import LAUNCHERS
from proxytune.errors import SettingsError, did_you_mean


@contextlib.contextmanager
def in_one_line(engine: Any, stage: str, search: list[str]) -> Generator[None]:
    """Turn whatever Hydra says of the given overrides into a SettingsError. `search`: overrides that name folders."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from yaml import MarkedYAMLError

    try:
        yield
    except OverrideParseException as error:
        hint = "quote a value with special characters: 'key=\"value\"'"
        raise SettingsError(f"cannot read {error.override!r}: not of the form key=value", hint) from error
    except MissingConfigException as error:
        raise _missing(error) from error
    except MarkedYAMLError as error:
        where = f"{error.problem_mark.name}, line {error.problem_mark.line + 1}" if error.problem_mark else "a file"
        raise SettingsError(f"{where} is not plain YAML: {error.problem}") from error
    except HydraException as error:
        raise _refused(error, stage, _known_keys(engine, stage, search)) from error


def _missing(error: Any) -> SettingsError:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if group == "hydra/launcher" and choice in LAUNCHERS:
        return SettingsError(f"{group}={choice} is not installed", "pip install 'proxytune[launchers]'")
    if not group:
        return SettingsError(str(error).splitlines()[0])
    return SettingsError(f"no {group} {choice!r}", did_you_mean(choice, error.options or []))


def _refused(error: Exception, stage: str, known: list[str]) -> SettingsError:
    """Any other HydraException: the misspelt key is the common one."""
    text = str(error) or str(error.__cause__)
    if key := re.search(r"Could not override '([^']+)", text):
        if key[1].partition(".")[0] == "base":
            return SettingsError(
                f"{stage} takes no base behind an API",
                "decode, serve, evaluate, sweep and doctor do",
            )
        close = difflib.get_close_matches(key[1], known, n=2, cutoff=0.6)
        hint = did_you_mean(key[1], close) if close else f"see proxytune {stage} --help"
        return SettingsError(f"unknown key {key[1]!r}", hint)
    if several := re.search(r"Ambiguous value for argument '(.*)'", text):
        hint = "add -m to run once for each; key=[a,b] is a list; 'key=\"a,b\"' a text"
        return SettingsError(f"{several[1]} gives several values", hint)
    cause = f": {error.__cause__}".splitlines()[0] if error.__cause__ and str(error) else ""
    return SettingsError(text.splitlines()[0] + cause)


def _known_keys(engine: Any, stage: str, search: list[str]) -> list[str]:
    """Every key and group of the stage, dotted, as composed without the overrides."""
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    try:
        config = engine.compose_config(stage, search, RunMode.RUN)
    except HydraException:  # the stage's own files are broken: the first error is the one to tell
        return []
    values: Any = OmegaConf.to_container(config, resolve=False)
    groups = [group for group in config.hydra.runtime.choices if group not in values]
    return [*groups, *_dotted({key: value for key, value in values.items() if key != "hydra"})]


def _dotted(values: dict[str, Any], prefix: str = "") -> Generator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
