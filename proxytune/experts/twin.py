"""A small sibling for a base that has none: some of the base's own layers, healed by distillation from the base.

Which layers stay is measured. A block's influence is 1 - the mean cosine between what goes into it and what comes out
(Men et al. 2024, "ShortGPT", arXiv 2403.03853, equation 1); the least influential are dropped. What that broke is
healed on plain text: the twin learns the base's distribution of the next token (Hinton et al. 2015, arXiv 1503.02531,
at temperature 1). The vocabulary is never touched, so the twin steers its base, and every model of its base's family.

Shapes: N windows of T tokens, B of them a step, V rows of the head.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from proxytune.errors import ModelError, SettingsError
from proxytune.experts.checkpoints import last_complete, mark, prune
from proxytune.files import remove_folder, told, write_json
from proxytune.settings import Healing
from proxytune.tracking.progress import bar, track

BETAS = (0.9, 0.95)
LARGEST_GRADIENT = 1.0  # norm over all weights; larger ones are scaled down to it


@dataclass
class Progress:
    """How far a healing is: the loss of every step so far, in nats per token, and the seconds they took."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def windows(paragraphs: Sequence[str], tokenizer, length: int) -> Tensor:
    """Paragraphs end to end, a blank line between, cut into windows (N, T) of `length` tokens; the rest is left out.

    Each window starts as the tokenizer starts a text: with BOS, if that is its habit.
    """
    start = [i for i in tokenizer("").input_ids if i == tokenizer.bos_token_id]
    texts = [paragraph + "\n\n" for paragraph in paragraphs]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
    flat = torch.tensor([i for paragraph in ids for i in paragraph], dtype=torch.int64)
    fresh = length - len(start)
    rows_NT = flat[: len(flat) // fresh * fresh].view(-1, fresh)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(len(rows_NT), -1), rows_NT], dim=1)


def blocks(model) -> tuple[str, torch.nn.ModuleList]:
    """The model's stack of layers and where in the model it stands."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return name, module
    raise ModelError(f"{type(model).__name__} has no stack of {count} layers to choose from", "take another base")


@torch.inference_mode()
def influence(model, windows_NT: Tensor) -> list[float]:
    """Of each layer 1 - cosine(input, output), the mean over all tokens: 0 does nothing, 2 turns everything round."""
    _, layers = blocks(model)
    total = [0.0] * len(layers)

    def watch(layer: int):
        def compare(_module, arguments, named, output) -> None:
            before = arguments[0] if arguments else named["hidden_states"]
            after = output if isinstance(output, Tensor) else output[0]
            total[layer] += (1 - F.cosine_similarity(before.float(), after.float(), dim=-1)).sum().item()

        return compare

    with contextlib.ExitStack() as hooks:
        for i, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_hook(watch(i), with_kwargs=True))
        for row_T in track(windows_NT, "measuring layers", len(windows_NT)):
            model.base_model(input_ids=row_T[None].to(model.device), use_cache=False)
    return [value / windows_NT.numel() for value in total]


def most_influential(influences: Sequence[float], count: int) -> list[int]:
    """The `count` layers to keep, in their order; of equals the earlier one."""
    if not 0 < count < len(influences):
        most = len(influences) - 1
        raise SettingsError(f"layers={count}: the base has {len(influences)} layers", f"keep between 1 and {most}")
    return sorted(sorted(range(len(influences)), key=lambda i: -influences[i])[:count])


def cut(model, keep: Sequence[int]):
    """A copy of the model with only these layers, renumbered; `model` stays as it is."""
    name, layers = blocks(model)
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == len(layers):  # such as each layer's kind of attention
            setattr(text, key, [value[i] for i in keep])
    text.num_hidden_layers = len(keep)
    weights = {}
    for key, value in model.state_dict().items():
        layer, _, rest = key.removeprefix(f"{name}.").partition(".")
        if not key.startswith(f"{name}."):
            weights[key] = value
        elif int(layer) in keep:
            weights[f"{name}.{keep.index(int(layer))}.{rest}"] = value
    smaller = type(model)(config)
    smaller.load_state_dict(weights)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.to(model.device).eval()


@torch.inference_mode()
def held_out_loss(model, windows_NT: Tensor) -> float:
    """Nats per token, each window read by itself; exp of it is the perplexity."""
    total = 0.0
    for row_T in track(windows_NT, "reading held-out text", len(windows_NT)):
        ids_1T = row_T[None].to(model.device)
        logits_TV = model(input_ids=ids_1T[:, :-1], use_cache=False).logits[0].float()
        total += F.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="sum").item()
    return total / windows_NT[:, 1:].numel()


def heal(
    twin,
    base,
    windows_NT: Tensor,
    how: Healing,
    work: Path,
    *,
    seed: int,
    log: Callable[[dict[str, float], int], None],
) -> Progress:
    """Teach `twin`, in place, the base's next-token distribution; a killed run goes on from its last checkpoint.

    work: the folder of checkpoints, this very job's. The order of windows follows from the seed, and no dropout is on,
    so a run in float32 that was killed and went on ends in the weights of one that was not.
    Raises SettingsError when the loss is no number any more.
    """
    weights = _trained(twin, how)
    optimizer = torch.optim.AdamW(weights.values(), betas=BETAS, weight_decay=how.weight_decay)
    done = _restore(work, weights, optimizer)
    order = _order(len(windows_NT), how.steps * how.batch_size, seed)
    cuda = twin.device.type == "cuda"
    bf16 = how.bf16 if how.bf16 is not None else cuda and torch.cuda.is_bf16_supported()
    with bar(note="{task.fields[loss]}", transient=False) as shown:
        task = shown.add_task("healing", total=how.steps, completed=len(done.losses), loss="")
        for step in range(len(done.losses), how.steps):
            began = time.monotonic()
            ids_BT = windows_NT[order[step * how.batch_size : (step + 1) * how.batch_size]].to(twin.device)
            with torch.autocast(twin.device.type, torch.bfloat16, enabled=bf16):
                distance = divergence(twin, base, ids_BT)
            distance.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), LARGEST_GRADIENT)
            optimizer.param_groups[0]["lr"] = rate = learning_rate(step, how)
            optimizer.step()
            optimizer.zero_grad()
            done.losses.append(distance.item())
            done.seconds += time.monotonic() - began
            if not math.isfinite(done.losses[-1]):
                raise SettingsError(f"healing diverged at step {step + 1}", "lower heal.learning_rate")
            shown.update(task, completed=step + 1, loss=f"loss {done.losses[-1]:.3f}")
            log({"heal/loss": done.losses[-1], "heal/learning_rate": rate}, step + 1)
            if (step + 1) % how.save_steps == 0:
                _save(work, weights, optimizer, done)
    return done


def divergence(twin, base, ids_BT: Tensor) -> Tensor:
    """KL(base || twin) of the next token, the mean over all positions, in nats."""
    with torch.no_grad():
        taught_BTV = F.log_softmax(base(input_ids=ids_BT, use_cache=False).logits.float(), dim=-1)
    learned_BTV = F.log_softmax(twin(input_ids=ids_BT, use_cache=False).logits.float(), dim=-1)
    return F.kl_div(learned_BTV, taught_BTV, log_target=True, reduction="sum") / ids_BT.numel()


def learning_rate(step: int, how: Healing) -> float:
    """Up in a line over the warm-up, then down to 0 along a cosine."""
    if step < how.warmup_steps:
        return how.learning_rate * (step + 1) / how.warmup_steps
    share = (step - how.warmup_steps) / max(1, how.steps - how.warmup_steps)
    return how.learning_rate * (1 + math.cos(math.pi * share)) / 2


def _trained(twin, how: Healing) -> dict[str, torch.nn.Parameter]:
    """The weights that healing may change, by name."""
    for part in (twin.get_input_embeddings(), twin.get_output_embeddings()):
        part.requires_grad_(not how.freeze_embeddings)
    return {name: weight for name, weight in twin.named_parameters() if weight.requires_grad}


def _order(count: int, wanted: int, seed: int) -> Tensor:
    """Which window is read when: all of them in random order, then all again in another."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(wanted // count + 1)])


def _save(work: Path, weights: dict[str, torch.nn.Parameter], optimizer, done: Progress) -> None:
    """A checkpoint, complete once its marker is there; only then the ones before it go."""
    from safetensors.torch import save_file

    folder = work / f"checkpoint-{len(done.losses)}"
    remove_folder(folder)
    with told(folder):
        folder.mkdir(parents=True)
        save_file({name: weight.detach() for name, weight in weights.items()}, folder / "weights.safetensors")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    write_json(folder / "progress.json", {"losses": done.losses, "seconds": done.seconds})
    mark(folder)
    prune(work, keep=1)


def _restore(work: Path, weights: dict[str, torch.nn.Parameter], optimizer) -> Progress:
    from safetensors.torch import load_file

    folder = last_complete(work)
    if folder is None:
        return Progress()
    saved = load_file(folder / "weights.safetensors")
    assert saved.keys() == weights.keys(), f"{folder} is of another model"
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return Progress(**json.loads((folder / "progress.json").read_text("utf-8")))
