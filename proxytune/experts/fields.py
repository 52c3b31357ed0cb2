"""TRL's configuration from a user's fields, under TRL's own names, over defaults that hold on any machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from proxytune.errors import SettingsError, did_you_mean
from proxytune.settings import Method

if TYPE_CHECKING:
    from trl import DPOConfig, SFTConfig

# Fields that a training is not given, by how their names begin, and what does it instead: TRL loads by them what we do
# not look at, model code among it, or sends what was trained to where nobody who runs the command may have meant.
OURS = {
    "chat_template_path": "family.chat_template names a model or a .jinja file",
    "model_init_kwargs": "the model is loaded before: see family and peft",
    "trust_remote_code": "code that comes with a model is never run",
    "push_to_hub": "proxytune registry push",
    "hub_": "proxytune registry push",
    "report_to": "tracker=wandb, local or none",
    "trackio_": "tracker=wandb, local or none",
}


def kind_of(method: Method) -> type[SFTConfig] | type[DPOConfig]:
    """TRL's configuration of a method."""
    import trl

    return {"sft": trl.SFTConfig, "dpo": trl.DPOConfig}[method.name]


def given(method: Method, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the user gives over the family's `defaults`, of which those count that TRL has, in the types that TRL wants.

    Raises SettingsError for a field that does not exist, cannot be of its type, or is not a training's to set (`OURS`).
    Nothing of a GPU is touched.
    """
    kind = kind_of(method)
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    fields = method.given()
    for key in fields:
        if key not in known:
            raise SettingsError(
                f"unknown key method.{key}: TRL's {kind.__name__} has no such field",
                did_you_mean(key, known | set(Method.model_fields)),
            )
    asked = {key: value for key, value in (defaults or {}).items() if key in known} | fields
    for key in asked:
        if instead := next((OURS[start] for start in OURS if key.startswith(start)), None):
            raise SettingsError(f"{'method' if key in fields else 'family.training'}.{key} cannot be set", instead)
    return _typed(kind, asked)


def configure(
    method: Method,
    output: Path,
    *,
    seed: int,
    evaluate: bool,
    defaults: Mapping[str, Any] | None = None,
):
    """An SFTConfig or DPOConfig; what nobody gives is left to TRL.

    evaluate: there are validation rows. defaults: as in `given`.
    Raises SettingsError for a field that does not exist or that TRL refuses.
    """
    kind, asked = kind_of(method), given(method, defaults)
    best = bool(asked.get("load_best_model_at_end") or method.early_stopping_patience)
    fields = _machine(seed) | _when(asked, best, evaluate) | asked
    if best and fields["eval_strategy"] == "no":
        raise SettingsError(
            "the best checkpoint is found on validation rows, and none are measured",
            "give validation rows and method.eval_strategy=epoch or steps, or leave early stopping out",
        )
    try:
        return kind(output_dir=str(output), **fields)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"method: {error}", f"see TRL's {kind.__name__} for the fields and their values") from error


def _typed(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the types that TRL declares: it checks few itself, and torch fails at the others far from here."""
    types, found = get_type_hints(kind), {}
    for key, value in given.items():
        try:
            found[key] = TypeAdapter(types[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            raise SettingsError(f"method.{key}={value!r}: {error.errors()[0]['msg']}") from error
    return found


def _machine(seed: int) -> dict[str, Any]:
    """Mixed precision by hardware; bars and reports are ours."""
    import torch

    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return {
        "use_cpu": not cuda,
        "bf16": bf16,
        "fp16": cuda and not bf16,
        "gradient_checkpointing": cuda,
        "report_to": "none",
        "save_total_limit": 2,
        "logging_steps": 10,
        "seed": seed,
        "data_seed": seed,
        "dataset_num_proc": None,
        "disable_tqdm": True,
    }


def _when(given: Mapping[str, Any], best: bool, evaluate: bool) -> dict[str, Any]:
    """When to save and to evaluate: by steps where steps are given, else each epoch.

    The best checkpoint can only be kept where it was measured when it was saved.
    """
    steps = {name: given.get(f"{name}_steps") for name in ("save", "eval")}
    if best and any(steps.values()):
        steps = {"save": steps["save"] or steps["eval"], "eval": steps["eval"] or steps["save"]}
    when = {f"{name}_strategy": "steps" if count is not None else "epoch" for name, count in steps.items()}
    when |= {} if evaluate else {"eval_strategy": "no"}
    # resuming restores how long early stopping has waited
    extra = {"load_best_model_at_end": True, "restore_callback_states_from_checkpoint": True} if best else {}
    return when | {f"{name}_steps": count for name, count in steps.items() if count is not None} | extra
