"""A checkpoint's network that holds no weights until they are asked for, and lets them go again.

Promise: the same checks as a network that is loaded whole, and the same weights wherever it has them. Memory: buffers,
what is materialised, and one tensor. It does not run anything: see `core.sensitivity.walk`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from core.errors import BitmillError
from core.network_tensors import Place, Weights, fill, names_by_parameter
from core.networks import build, checked_places, network_config
from core.storage.checkpoint import CheckpointIndex
from core.tensors.reader import read_tensor

_Slot = tuple[nn.Module, str]


class HollowNetwork:
    """`network`: parameters on the meta device, buffers on the CPU with their values; in eval mode, without gradients.

    `tensor_names`: the checkpoint's tensors behind each parameter.
    Raises what `load_network` raises, except for what only a forward pass would tell.
    """

    def __init__(self, index: CheckpointIndex, *, dtype: torch.dtype, weights: Weights | None = None) -> None:
        config = network_config(index)
        places = checked_places(index, config, dtype)
        with _without_memory():
            self.network = build(index, config, "cpu", dtype).requires_grad_(False).eval()
        self._weights = weights or partial(read_tensor, index)
        self._meta: dict[_Slot, nn.Parameter] = {}
        targets: Mapping[str, torch.Tensor] = self.network.state_dict(keep_vars=True)
        self.tensor_names = names_by_parameter(self.network, places)
        self._stored: dict[int, list[tuple[str, Place]]] = {}
        for name, place in places.items():
            self._stored.setdefault(id(targets[place.target]), []).append((name, place))
        buffers = [one for one in places.items() if not targets[one[1].target].is_meta]
        with torch.no_grad():
            fill(targets, buffers, self._weights)

    def stored(self, module: nn.Module, key: str) -> list[tuple[str, Place]]:
        """The checkpoint's tensors, sorted, behind the parameter `key` of a module, with their places in it."""
        parameter = self._meta.get((module, key), module._parameters[key])
        return sorted(self._stored.get(id(parameter), ()), key=lambda one: one[0])

    def names(self, module: nn.Module) -> tuple[str, ...]:
        """The checkpoint's tensors in a module, sorted."""
        return tuple(sorted({name for slot in _slots(module.modules()) for name, _ in self.stored(*slot)}))

    def materialise(self, module: nn.Module, device: str = "cpu", *, alone: bool = False) -> None:
        """Give memory and values to the parameters of a module, and bring its buffers to the device.

        `alone`: its own parameters, not those of the modules in it. What has memory already is left as it is.
        """
        modules = [module] if alone else list(module.modules())
        hollow = [slot for slot in _slots(modules) if _parameter(slot).is_meta]
        made: dict[int, nn.Parameter] = {}
        for slot in hollow:
            meta = self._meta[slot] = _parameter(slot)
            if id(meta) not in made:
                made[id(meta)] = nn.Parameter(torch.empty_like(meta, device=device), requires_grad=False)
            slot[0]._parameters[slot[1]] = made[id(meta)]
        _move_buffers(modules, device)
        self._fill(made, self._weights)

    def load(self, module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
        """Other values for some tensors of a materialised module; an internal error when it does not hold them."""
        held = {id(self._meta[slot]): _parameter(slot) for slot in _slots(module.modules()) if slot in self._meta}
        missing = set(values)
        for meta in held:
            missing -= {name for name, _ in self._stored.get(meta, ())}
        if missing:
            raise BitmillError("this part of the network does not hold it", where=min(missing))
        self._fill(held, values.__getitem__, only=values.keys())

    def release(self, module: nn.Module) -> None:
        """Let go of the weights of a module, also towards the system; its buffers come back to the CPU."""
        modules = list(module.modules())
        for slot in _slots(modules):
            if slot in self._meta:
                slot[0]._parameters[slot[1]] = self._meta.pop(slot)
        _move_buffers(modules, "cpu")
        return_memory()

    @torch.no_grad()
    def _fill(self, real: Mapping[int, nn.Parameter], weights: Weights, only: Iterable[str] | None = None) -> None:
        wanted = None if only is None else set(only)
        for meta, parameter in real.items():
            chosen = [one for one in self._stored.get(meta, ()) if wanted is None or one[0] in wanted]
            fill({place.target: parameter for _, place in chosen}, chosen, weights)


def return_memory() -> None:
    """Hand freed memory back to the system.

    Between what stays, glibc keeps freed activations, and does not find them again for aligned tensors of the same
    size: without this a process grows with every block, and by several times the logits that it compares.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _slots(modules: Iterable[nn.Module]) -> list[_Slot]:
    return [(module, key) for module in modules for key, held in module._parameters.items() if held is not None]


def _parameter(slot: _Slot) -> nn.Parameter:
    held = slot[0]._parameters[slot[1]]
    if held is None:
        raise BitmillError("a parameter vanished", where=slot[1])
    return held


def _move_buffers(modules: Iterable[nn.Module], device: str) -> None:
    for module in modules:
        for key, held in module._buffers.items():
            if held is not None:
                module._buffers[key] = held.to(device)


@contextmanager
def _without_memory() -> Iterator[None]:
    """Within it parameters are put on the meta device as soon as a module gets them: one has memory at a time."""
    register = nn.Module.register_parameter

    def hollow(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        meta = param is None or param.is_meta
        register(module, name, param if meta else nn.Parameter(param.to("meta"), requires_grad=False))  # type: ignore[union-attr]

    nn.Module.register_parameter = hollow  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
