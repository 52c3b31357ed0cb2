"""Keys and values in slots: a sequence's slot is its position.

Every row writes its new keys and values at its own positions, and sees the slots up to each of them. So rows of any
lengths share a batch without padding, and rolling back is reading again from a smaller position: no crop, no
realignment.

Shapes: N sequences read now, H key-value heads, Q new positions, S slots in use, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache


class Slots(Cache):
    """Room for `rows` sequences of `length` slots in every layer, made when first needed and enlarged when too small.

    `aim` says which sequences the next forward reads and where; the model's layers then call `update`.
    """

    def __init__(self, rows: int, length: int):
        super().__init__(layers=[])
        self.rows, self.length = rows, length
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.places: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def aim(self, rows: slice, starts_N: Tensor, width: int) -> int:
        """Read `width` ids of these sequences from their starts (on the CPU) on; returns the number of slots in use."""
        low, high = int(starts_N.min()), int(starts_N.max())
        used = high + width
        self._fit(rows.stop, used)
        self.at = (rows, low if low == high else starts_N[:, None] + torch.arange(width), used)
        self.places.clear()
        return used

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Write new keys and values, (N, H, Q, D), and return all of these sequences' slots in use, (N, H, S, D)."""
        if layer_idx not in self.kept:
            self.kept[layer_idx] = (self._room(key_states), self._room(value_states))
        rows, positions, used = self.at
        seen = []
        for room, states in zip(self.kept[layer_idx], (key_states, value_states), strict=True):
            view = room[rows]
            if isinstance(positions, int):
                view[:, :, positions:used] = states
            else:
                sequences_N1, positions_NQ = self._places(positions, states.device)
                view[sequences_N1, :, positions_NQ] = states.transpose(1, 2)
            seen.append(view[:, :, :used])
        return tuple(seen)

    def _places(self, positions_NQ: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices of what is written, on this device: sent once a read, not by each layer, since a GPU waits for it."""
        if device not in self.places:
            self.places[device] = torch.arange(len(positions_NQ), device=device)[:, None], positions_NQ.to(device)
        return self.places[device]

    @torch.inference_mode()
    def copy(self, rows: slice, to: slice) -> None:
        self._fit(to.stop, self.length)
        for pair in self.kept.values():
            for room in pair:
                room[to] = room[rows]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are always given

    def _room(self, states: Tensor) -> Tensor:
        shape = (self.rows, states.shape[1], self.length, states.shape[3])
        return torch.zeros(shape, dtype=states.dtype, device=states.device)

    def _fit(self, rows: int, length: int) -> None:
        """Make room for so many rows and slots, and some more, where there is less."""
        if rows <= self.rows and length <= self.length:
            return
        self.rows = self.rows if rows <= self.rows else max(rows, self.rows * 3 // 2)
        self.length = self.length if length <= self.length else max(length, self.length * 3 // 2)
        for layer, (keys, values) in self.kept.items():
            self.kept[layer] = (self._larger(keys), self._larger(values))

    def _larger(self, room: Tensor) -> Tensor:
        larger = self._room(room)
        larger[: room.shape[0], :, : room.shape[2]] = room
        return larger


def visible(kinds: dict[str, int | None], positions_NQ: Tensor, used: int, additive: torch.dtype | None):
    """What each new position may see, (N, 1, Q, S): for one kind of layer the mask, for several one of each by name.

    kinds: the window of each kind of layer, None where everything before is seen. additive: the dtype of a mask to add
    to scores, for attention that takes no boolean one.
    """
    slots_S = torch.arange(used, device=positions_NQ.device)
    seen = slots_S <= positions_NQ[:, None, :, None]
    masks = {}
    for kind, window in kinds.items():
        mask = seen if window is None else seen & (slots_S > positions_NQ[:, None, :, None] - window)
        if additive is not None:
            mask = torch.zeros_like(mask, dtype=additive).masked_fill(~mask, torch.finfo(additive).min)
        masks[kind] = mask
    return masks if len(masks) > 1 else next(iter(masks.values()))
