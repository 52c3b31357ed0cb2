"""Hydra, and nothing but Hydra: composes a stage's settings and runs its job, once or once a point of a multirun.

Hydra's objects are driven directly, not through `hydra.main`, because that prints its errors in several lines, ends the
process itself, and drops what jobs of a multirun return. Here a job returns None or its `Failure`, also from another
process, and the caller tells every failure once.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines import exits, refusals
from pipelines.parser import Parser
from proxytune.errors import SettingsError
from proxytune.files import resource

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def parser(stage: str) -> Parser:
    flags = Parser(prog=f"proxytune {stage}", add_help=False)
    flags.add_argument("overrides", nargs="*", help="key=value, group=choice")
    flags.add_argument("-m", "--multirun", action="store_true", help="run once for each of several values")
    flags.add_argument("-c", "--cfg", choices=["job", "hydra", "all"], help="print the settings instead of running")
    flags.add_argument("-p", "--package", help="with --cfg: only this part")
    flags.add_argument("--resolve", action="store_true", help="with --cfg: with interpolations filled in")
    flags.add_argument("-i", "--info", nargs="?", const="all", choices=INFO, help="what Hydra found")
    flags.add_argument("-cd", "--config-dir", help="a folder with groups of your own")
    flags.add_argument("--hydra-help", action="store_true", help="Hydra's own settings")
    if stage == "expert":
        flags.add_argument("--from-manifest", metavar="REF", help="the recipe of a registered expert once more")
    return flags


def launch(stage: str, arguments: Sequence[str], command: str) -> int:
    """Compose `stage` from conf/ and `arguments`, do what they ask for, and return the exit code."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    from pipelines.loader import Loader

    flags = parser(stage)
    options = flags.parse_intermixed_args(arguments)
    if (reference := getattr(options, "from_manifest", None)) is not None:
        own = ("overrides", "from_manifest")
        if others := [name for name in vars(options).keys() - own if getattr(options, name) != flags.get_default(name)]:
            asked = " ".join(sorted(f"--{name.replace('_', '-')}" for name in others))
            raise SettingsError(f"{asked} does not go with --from-manifest", "its settings are those of the manifest")
        return importlib.import_module(f"pipelines.{stage}").reproduce(reference, options.overrides, command)
    search = search_path(options.config_dir)
    overrides = [*options.overrides, *search]
    with initialize_config_dir(str(resource("conf")), job_name=stage, version_base="1.3"):
        engine = GlobalHydra.instance().hydra
        assert engine is not None
        engine.config_loader = Loader(engine.config_loader.get_search_path())
        prefer_modest_launchers()
        with refusals.in_one_line(engine, stage, options.overrides, search):
            if options.cfg:
                try:
                    engine.show_cfg(stage, overrides, options.cfg, options.package, options.resolve)
                except SystemExit:  # it has told that there is no such package
                    return SettingsError.exit_code
            elif options.info:
                engine.show_info(options.info, stage, overrides)
            elif options.hydra_help:
                engine.hydra_help(stage, flags, options)
            elif options.multirun or engine.get_mode(stage, overrides) == RunMode.MULTIRUN:
                return multirun(engine, stage, command, overrides)
            else:
                return single(engine, stage, command, [as_meant(override) for override in overrides])
    return 0


def single(engine: Any, stage: str, command: str, overrides: list[str]) -> int:
    failure = engine.run(stage, functools.partial(job, stage=stage, command=command), overrides).return_value
    return failure.tell() if failure else 0


def multirun(engine: Any, stage: str, command: str, overrides: list[str]) -> int:
    """Run every job, whichever fail; tell each failure; let the stage sum up what is done. The first failure's code."""
    group = f"{stage}-{datetime.now():%Y%m%d-%H%M%S}"
    task = functools.partial(job, stage=stage, command=command, group=group)
    jobs = [done for batch in engine.multirun(stage, task, overrides) for done in batch]
    codes = [tell_job(done) for done in jobs if done.return_value]
    whole = [plain(done.cfg, command, group) for done in jobs if not done.return_value]
    gather = getattr(importlib.import_module(f"pipelines.{stage}"), "gather", None)
    if gather and whole:
        try:
            gather(whole)
        except Exception as error:  # as in a job: what it raises is none of Hydra's
            codes.append(exits.of(error).tell())
    return next(iter(codes), 0)


def job(config: Any, *, stage: str, command: str, group: str | None = None) -> exits.Failure | None:
    """One job, in whichever process: the stage called with plain values. Returns what went wrong, never raises it."""
    try:
        importlib.import_module(f"pipelines.{stage}").run(plain(config, command, group))
    except Exception as error:
        return exits.of(error)
    return None


def plain(config: Any, command: str, group: str | None) -> dict[str, Any]:
    """The composed settings as plain containers, everything resolved; jobs of one multirun share a tracker group."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise SettingsError(f"{error.full_key} is not given", f"add {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise SettingsError(str(error).splitlines()[0]) from error
    if group and "tracker" in values and values["tracker"].get("group") is None:
        values["tracker"]["group"] = group
    return {**values, "command": command}


def tell_job(done: Any) -> int:
    failure, which = done.return_value, " ".join(done.overrides)
    return failure._replace(text=f"{failure.text} [job {which}]" if failure.text else "").tell()


def search_path(folder: str | None) -> list[str]:
    """`--config-dir` as an override, which jobs in other processes see as well."""
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise SettingsError(f"--config-dir {folder}: no such folder")
    quoted = str(Path(folder).resolve()).replace("'", "\\'")
    return [f"hydra.searchpath=['file://{quoted}']"]


def as_meant(override: str) -> str:
    """`harness=a,b` as a list and `prompt=...` as it stands, which in Hydra's grammar are other things."""
    key, _, text = override.partition("=")
    return f"harness=[{text}]" if key == "harness" and text[:1] not in ("[", "") else literal_prompt(override)


def literal_prompt(override: str) -> str:
    """Take `prompt=...` as it stands: a prompt's commas, quotes and braces are no business of Hydra's grammar.

    A value that is wholly quoted, `null` or an interpolation is left to Hydra.
    """
    key, _, text = override.partition("=")
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if key != "prompt" or quoted or text in ("", "null") or text.startswith("${"):
        return override
    os.environ["PROXYTUNE_PROMPT"] = text
    return "prompt=${oc.env:PROXYTUNE_PROMPT}"


def prefer_modest_launchers() -> None:
    """Two jobs at a time and a day's limit, where the launchers' own defaults are every core and one hour."""
    from hydra.core.config_store import ConfigStore

    try:
        from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf
        from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf
    except ImportError:  # proxytune[launchers] is not installed: Hydra's basic launcher is all there is
        return
    day = 24 * 60
    for name, node in {
        "joblib": JobLibLauncherConf(n_jobs=2),
        "submitit_local": LocalQueueConf(timeout_min=day),
        "submitit_slurm": SlurmQueueConf(timeout_min=day),
    }.items():
        ConfigStore.instance().store(group="hydra/launcher", name=name, node=node, provider="proxytune")
