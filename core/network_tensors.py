"""Which of a checkpoint's tensors goes where in a network: by name, tied ones once, experts into stacked parameters.

Promise: places that were found fill the network exactly. Every tensor has one (but those that the architecture itself
declares superfluous), no two have the same, and shapes were compared without any memory for weights. It builds no
network and reads no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from core.errors import BitmillError, InvalidCheckpoint
from core.storage.checkpoint import CheckpointIndex
from core.tensors.dtypes import FLOATING

Weights = Callable[[str], torch.Tensor]

_RENAMED = (("embed_out.", "lm_head."), (".block_sparse_moe.", ".mlp."))
# Experts stored one by one go into the stacked parameters of the network: (parameter, part of the second dimension).
_EXPERT = re.compile(r"^(.+\.experts)\.(\d{1,6})\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
_EXPERT_PARTS = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w2": ("down_proj", None),
}
_OLD_ROTARY = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's tensor goes: a tensor of the network, one expert of it, or half the rows of that expert."""

    target: str
    expert: int | None = None
    half: int | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of `tensor` that this is; a view."""
        if self.expert is None:
            return tensor
        chosen = tensor[self.expert]
        return chosen if self.half is None else chosen.chunk(2)[self.half]

    def fits(self, targets: Mapping[str, torch.Tensor]) -> bool:
        """Whether the network has it."""
        target = targets.get(self.target)
        return target is not None and (self.expert is None or (target.ndim == 3 and self.expert < len(target)))


def places_of(index: CheckpointIndex, skeleton: nn.Module) -> dict[str, Place]:
    """Where each counted tensor goes; InvalidCheckpoint names one that has no place or another shape."""
    targets: Mapping[str, torch.Tensor] = skeleton.state_dict(keep_vars=True)
    prefix = str(getattr(skeleton, "base_model_prefix", ""))
    taken: dict[Place, str] = {}
    for name in index.names:
        place = next((place for place in _candidates(name, prefix) if place.fits(targets)), None)
        if place is None:
            if _is_superfluous(name, skeleton):
                continue
            raise InvalidCheckpoint("the architecture of the config has no such tensor", where=name)
        _check_shape(index, name, place.of(targets[place.target]))
        if other := taken.get(place):
            raise InvalidCheckpoint(f"is the same parameter as {other}", where=name)
        taken[place] = name
    return {name: place for place, name in taken.items()}


def _candidates(name: str, prefix: str) -> Iterator[Place]:
    """The places a tensor of that name may have, likeliest first."""
    yield Place(name)
    yield Place(f"{prefix}.{name}")
    for stored, used in _RENAMED:
        yield Place(name.replace(stored, used))
    if found := _EXPERT.match(name.replace(".block_sparse_moe.", ".mlp.")):
        parameter, half = _EXPERT_PARTS[found[3]]
        yield Place(f"{found[1]}.{parameter}", int(found[2]), half)


def _is_superfluous(name: str, skeleton: nn.Module) -> bool:
    """Whether the architecture declares that checkpoints may hold this tensor and that it is not needed."""
    patterns = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
    return bool(_OLD_ROTARY.search(name)) or any(re.search(pattern, name) for pattern in patterns)


def _check_shape(index: CheckpointIndex, name: str, wanted: torch.Tensor) -> None:
    entry = index.tensors[name]
    if tuple(wanted.shape) != entry.shape:
        raise InvalidCheckpoint(f"has shape {list(entry.shape)}, the config asks for {list(wanted.shape)}", where=name)
    if wanted.is_floating_point() and entry.dtype not in FLOATING:
        raise InvalidCheckpoint(f"holds {entry.dtype}, which are not weights as they are used", where=name)


def check_filled(skeleton: nn.Module, places: Mapping[str, Place]) -> None:
    """InvalidCheckpoint names the first parameter that the checkpoint does not fill."""
    targets: Mapping[str, torch.Tensor] = skeleton.state_dict(keep_vars=True)
    filled: dict[int, int] = {}
    for place in places.values():
        target = targets[place.target]
        filled[id(target)] = filled.get(id(target), 0) + place.of(target).numel()
    for name, parameter in skeleton.named_parameters():
        if filled.get(id(parameter), 0) != parameter.numel():
            raise InvalidCheckpoint("the checkpoint lacks this tensor or a part of it", where=name)


@torch.no_grad()
def fill(targets: Mapping[str, torch.Tensor], places: Iterable[tuple[str, Place]], weights: Weights) -> None:
    """Copy each tensor to its place in `targets`; an internal error when it has another shape than was planned."""
    for name, place in places:
        part, given = place.of(targets[place.target]), weights(name)
        if part.shape != given.shape:
            raise BitmillError(f"planned as {list(part.shape)}, is {list(given.shape)}", where=name)
        part.copy_(given)


def names_by_parameter(network: nn.Module, places: Mapping[str, Place]) -> dict[str, tuple[str, ...]]:
    """The tensors behind each parameter of a network that is filled."""
    targets: Mapping[str, torch.Tensor] = network.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, place in places.items():
        names.setdefault(id(targets[place.target]), []).append(name)
    return {name: tuple(names[id(parameter)]) for name, parameter in network.named_parameters()}
