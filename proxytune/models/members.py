"""An expert and its anti from one copy of the weights: the rows of one forward, with the adapter on some of them.

A LoRA expert (Hu et al. 2021, arXiv 2106.09685) is its anti plus a low-rank term in some linear layers. So one forward
over one copy of the small model's weights gives both, and further experts of the same anti: the linear layer runs once
over all rows, and each adapter's term is added to the rows of its member.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path

from torch import Tensor, nn

from proxytune.errors import ModelError
from proxytune.models.loading import adapter_told
from proxytune.models.quiet import quiet

# What of an adapter's configuration says how it is named and shaped: with all else as PEFT has it by default, the
# adapter adds low-rank terms to linear layers and nothing more.
SHAPE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
SHAPE |= {"alpha_pattern", "lora_alpha", "lora_dropout", "r", "rank_pattern", "use_rslora"}
SHAPE |= {"exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform", "target_modules"}
STARTS = (True, False, "gaussian")  # other ways to begin an adapter change the weights under it, at loading too

# The members of the forward that runs now in this thread; row i belongs to the (i % count)-th. 0 is the bare model.
ACTIVE: ContextVar[tuple[int, ...]] = ContextVar("active", default=(0,))


class MemberLinear(nn.Module):
    """A linear layer with one low-rank term for each adapter: y = W x, and y += B_m A_m x on the rows of member m."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.low: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def weight(self) -> Tensor:
        """The bare model's: a head is asked for its rows."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        members = ACTIVE.get()
        split = len(members)
        for place, member in enumerate(members):
            if member in self.low:
                down_RI, up_OR = self.low[member]
                y[place::split] += (x[place::split] @ down_RI.T) @ up_OR.T
        return y


def attach(model, adapters: Sequence[Path]) -> None:
    """Put the adapters (folders written by PEFT) on the model as members 1, 2, ..., in place.

    PEFT reads the files, so ranks, patterns and scaling are what it says they are. Raises ModelError for adapters whose
    term is not low-rank alone (`separable` tells beforehand).
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    wrapped = None
    for number, folder in enumerate(adapters, 1):
        if not separable(folder):
            raise ModelError(
                f"{folder} is no plain LoRA adapter, so it cannot share its anti's weights", "load it merged"
            )
        name = str(number)
        with adapter_told(folder), quiet():
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
            else:
                wrapped.load_adapter(str(folder), adapter_name=name)
    for path, layer in list(model.named_modules()):  # PEFT changed the model in place
        if isinstance(layer, LoraLayer):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, _split(layer))


def separable(folder: Path) -> bool:
    """Whether an adapter only adds low-rank terms to linear layers (no DoRA, biases, embeddings or whole modules)."""
    from peft import LoraConfig, PeftConfig
    from safetensors import safe_open

    with adapter_told(folder):
        config = PeftConfig.from_pretrained(str(folder))
        with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
            names = list(weights.keys())
    if type(config) is not LoraConfig or any("lora_embedding_" in name for name in names):
        return False
    plain = LoraConfig().to_dict()
    odd = {name for name, value in config.to_dict().items() if name not in SHAPE and value != plain[name]}
    return not odd and config.init_lora_weights in STARTS


def _split(layer) -> nn.Module:
    linear = layer.get_base_layer()
    if not isinstance(linear, nn.Linear):
        raise ModelError(
            f"an adapter changes a {type(linear).__name__}, which cannot be split by rows", "load it merged"
        )
    made = MemberLinear(linear)
    for name in layer.lora_A:
        scale = layer.scaling[name]
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        made.low[int(name)] = (down.detach().to(linear.weight), (up.detach() * scale).to(linear.weight))
    return made.eval()
