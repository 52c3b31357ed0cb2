"""Hydra's refusals in one line: what was given, and what was probably meant."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from pipelines.guide import LAUNCHERS
from proxytune.errors import SettingsError, did_you_mean


@contextlib.contextmanager
def in_one_line(engine: Any, stage: str, overrides: list[str], search: list[str]) -> Generator[None]:
    """Turn whatever Hydra says of the given overrides into a SettingsError. `search`: those that name folders."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError, YAMLError

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
        raise _refused(error, Known(engine, stage, overrides, search)) from error
    except (ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        if key := _into_a_list(error, overrides):
            what = f"{key} sets one key of what is a list"
            raise SettingsError(what, f"give it as a whole: {key.partition('.')[0]}=[...]") from error
        told = "a file is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else " ".join(str(error).split())
        hint = "look into the files of --config-dir" if search else ""
        raise SettingsError(f"these settings cannot be composed: {told[:300]}", hint) from error


def _missing(error: Any) -> SettingsError:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if group == "hydra/launcher" and choice in LAUNCHERS:
        return SettingsError(f"{group}={choice} is not installed", "pip install 'proxytune[launchers]'")
    if not group:
        return SettingsError(str(error).splitlines()[0])
    return SettingsError(f"no {group} {choice!r}", did_you_mean(choice, error.options or []))


def _into_a_list(error: Exception, overrides: list[str]) -> str | None:
    """The override whose key goes on into a list, where OmegaConf wants a number and says no more than what it got."""
    got = re.search(r"invalid literal for int\(\) with base 10: '(.*)'", str(error))
    keys = [override.partition("=")[0] for override in overrides]
    return next((key for key in keys if got and got[1] in key.split(".")[1:]), None)


def _refused(error: Exception, known: Known) -> SettingsError:
    """Any other HydraException: the misspelt key is the common one."""
    text = str(error) or str(error.__cause__)
    if key := re.search(r"Could not override '([^']+)", text):
        if key[1].partition(".")[0] == "base":
            return SettingsError(
                f"{known.stage} takes no base behind an API",
                "decode, serve, evaluate, sweep and doctor do",
            )
        return SettingsError(f"unknown key {key[1]!r}", known.hint(key[1]))
    if several := re.search(r"Ambiguous value for argument '(.*)'", text):
        hint = "add -m to run once for each; key=[a,b] is a list; 'key=\"a,b\"' a text"
        return SettingsError(f"{several[1]} gives several values", hint)
    cause = f": {error.__cause__}".splitlines()[0] if error.__cause__ and str(error) else ""
    return SettingsError(text.splitlines()[0] + cause)


@dataclass(frozen=True)
class Known:
    """The keys and groups that a stage has. search: overrides that name folders with more of them."""

    engine: Any
    stage: str
    overrides: list[str]
    search: list[str]

    def hint(self, key: str) -> str:
        """What may have been meant: a key of the chosen groups, else one that another choice of its group has."""
        if close := _closest(key, self._keys(self._chosen())):
            return did_you_mean(key, close)
        group = key.partition(".")[0]
        for choice in self._choices(group):
            own = [known for known in self._keys([f"{group}={choice}"]) if known.startswith(f"{group}.")]
            if close := _closest(key, own):
                return f"{close[0]!r} is a key of {group}={choice}"
        return f"see proxytune {self.stage} --help"

    def _chosen(self) -> list[str]:
        return [override for override in self.overrides if self._choices(override.partition("=")[0])]

    def _choices(self, group: str) -> list[str]:
        return self.engine.config_loader.get_group_options(group)

    def _keys(self, chosen: list[str]) -> list[str]:
        """Every key and group, dotted; none where these choices cannot be composed."""
        from hydra.errors import HydraException
        from hydra.types import RunMode
        from omegaconf import OmegaConf

        try:
            config = self.engine.compose_config(self.stage, [*chosen, *self.search], RunMode.RUN)
        except HydraException:  # the first error is the one to tell
            return []
        values: Any = OmegaConf.to_container(config, resolve=False)
        groups = [group for group in config.hydra.runtime.choices if group not in values]
        return [*groups, *_dotted({key: value for key, value in values.items() if key != "hydra"})]


def _closest(key: str, known: list[str]) -> list[str]:
    """At most two known keys whose last part is like this one's, those of the same section first."""
    section, _, last = key.rpartition(".")
    ends = {other: other.rpartition(".")[2] for other in known}
    like = difflib.get_close_matches(last, set(ends.values()), n=4, cutoff=0.6)
    found = [other for end in like for other, its in ends.items() if its == end]
    return sorted(found, key=lambda other: other.rpartition(".")[0] != section)[:2]


def _dotted(values: dict[str, Any], prefix: str = "") -> Generator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
