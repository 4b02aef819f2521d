"""A forward and a backward pass of many windows through a checkpoint's network, a block at a time.

On the way forward nothing is kept of a block but what each batch called it with (`core.sensitivity.shelf`). What lies
between blocks is recorded by autograd as it runs, from one block's answers to the next one's arguments. On the way
back a block gets its weights again and answers each batch once more, now recorded; the gradient of what it answers is
complete by then, because everything after it has been. Modules with weights outside of blocks are treated alike, so
each layer has one backward pass for each of its calls, with the whole gradient.

Promise: the gradients of the whole network's backward pass. Memory: that of the walk, the gradients of one block's
answers, and one batch of a block's own activations. Refused, as UnsupportedArchitecture: networks that do not say which
layer answers logits, or whose blocks hand each other tensors in objects, in attributes or by writing over arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from core.errors import UnsupportedArchitecture
from core.evaluation.text import Windows
from core.hollow import return_memory
from core.networks import forward_pass
from core.sensitivity.shelf import Kept, Shelf
from core.sensitivity.walk import DICTS, BlockWalk, Call, Lane, blocks_of
from core.storage.checkpoint import CheckpointIndex

Tell = Callable[[float, str], None]
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, Enum, range, slice)


class _Cell:
    """Where the gradient of something that a module answered gathers, on the CPU."""

    def __init__(self) -> None:
        self.gradient: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor) -> None:
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


class _Answer(torch.autograd.Function):
    """A tensor of one's own as the beginning of a graph: its gradient goes to a cell, and nothing holds the tensor."""

    @staticmethod
    def forward(ctx: Any, _anchor: torch.Tensor, box: list[torch.Tensor], cell: _Cell) -> torch.Tensor:
        ctx.cell = cell
        return box.pop()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        ctx.cell.add(gradient)
        return None, None, None


@dataclass
class _Given:
    """In the place of a tensor that has a gradient: where that goes, and the tensor on the shelf."""

    edge: GradientEdge
    kept: Kept


@dataclass
class _Step:
    """A call of a module on the way forward: what with, and the cells of what it answered, in order."""

    call: Call
    cells: list[_Cell]


@dataclass(frozen=True)
class _Used(Call):
    """A call on the device, and what its dicts had before: (dict, key) -> the tensor and its version."""

    before: dict[tuple[int, Any], tuple[Any, int]]


@dataclass
class _Live:
    """A call that was repeated with gradients: what it answered, and its arguments with where their gradients go."""

    outputs: list[torch.Tensor]
    leaves: list[tuple[GradientEdge, torch.Tensor]]


class BackwardWalk(BlockWalk):
    """A walk that goes back, too: enter it, and call `backward` once. `shelf`: where arguments of blocks wait."""

    def __init__(
        self, index: CheckpointIndex, windows: Windows, shelf: Shelf, *, device: str, dtype: torch.dtype
    ) -> None:
        super().__init__(index, windows, device=device, dtype=dtype)
        self._shelf = shelf
        self._tapes: list[list[_Step]] = []
        self._anchor = torch.ones((), requires_grad=True)

    def backward(
        self,
        gradient: Callable[[int, torch.Tensor], torch.Tensor],
        within: Callable[[int], AbstractContextManager[None]],
        tell: Tell,
    ) -> None:
        """`gradient(batch, logits)`: that of the loss, where the logits are, before they are thrown away.

        `within(batch)` surrounds everything that is computed with gradients for a batch; each module's calls are seen
        by torch hooks there, and nothing else is. `tell(fraction, name)` may raise.
        """
        blocks, head = blocks_of(self.network)
        if head is None:
            raise UnsupportedArchitecture("the network does not say which layer answers logits", where="config.json")
        self._tapes = [[] for _ in range(self.batches)]
        visited: list[nn.Module] = []
        for block in self:
            told = partial(self._tell, tell, 0, len(visited) / max(len(blocks), len(visited) + 1), block.name)
            if self.is_head(block.module):
                self._turn(gradient, within, told)
            else:
                block.run(told, last=True)
                visited.append(block.module)
        for at, module in enumerate(reversed(visited)):
            self._return(module, within, partial(self._tell, tell, 1, at / len(visited), self._names[module]))

    def _tell(self, tell: Tell, back: int, share: float, name: str, batch: int) -> None:
        """The way back is twice as long."""
        tell((back + share * (1 + back)) / 3, f"{name}, batch {batch + 1} of {self.batches}")

    def _turn(
        self,
        gradient: Callable[[int, torch.Tensor], torch.Tensor],
        within: Callable[[int], AbstractContextManager[None]],
        tell: Callable[[int], None],
    ) -> None:
        """The head, forward and back at once, because logits are large."""
        for batch in range(self.batches):
            tell(batch)
            with within(batch):
                self._turn_one(batch, gradient)
            return_memory()
        self._return_outside(within)

    def _turn_one(self, batch: int, gradient: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        step = _Step(self._put_aside(self.waiting(batch)), [])
        self._tapes[batch].append(step)
        with forward_pass(self._index):
            output, live = self._repeat(step.call)
        with torch.enable_grad():
            logits = self.conclude(batch, self._answers(output, step.cells))
        if logits.requires_grad:
            torch.autograd.backward([logits], [gradient(batch, logits.detach())])
        del logits, output
        self._return_outside_of(batch)
        self._push(self._tapes[batch].pop(), live)

    def _return(
        self, module: nn.Module, within: Callable[[int], AbstractContextManager[None]], tell: Callable[[int], None]
    ) -> None:
        """Back through a block, and then through what came before it."""
        self.hollow.materialise(module, self.device)
        try:
            for batch, tape in enumerate(self._tapes):
                tell(batch)
                with within(batch):
                    self._undo(tape.pop())
        finally:
            self.hollow.release(module)
        self._return_outside(within)

    def _return_outside(self, within: Callable[[int], AbstractContextManager[None]]) -> None:
        for batch in range(len(self._tapes)):
            with within(batch):
                self._return_outside_of(batch)
        self._give_back()

    def _return_outside_of(self, batch: int) -> None:
        """Back to the call of a block."""
        tape = self._tapes[batch]
        while tape and tape[-1].call.module not in self._blocks:
            self._lend(tape[-1].call.module)
            self._undo(tape.pop(), "cpu")

    def _lend(self, module: nn.Module) -> None:
        if module not in self._borrowed:
            self.hollow.materialise(module)
            self._borrowed.append(module)

    def _undo(self, step: _Step, device: str | None = None) -> None:
        with forward_pass(self._index):
            _, live = self._repeat(step.call, device)
        self._push(step, live)

    def _push(self, step: _Step, live: _Live) -> None:
        """The gradients of a call's answers to its layers and its arguments, and on to what these were made of."""
        found = [(one, cell.gradient) for one, cell in zip(live.outputs, step.cells, strict=True) if one.requires_grad]
        reached = [(one, gradient.to(one.device)) for one, gradient in found if gradient is not None]
        if reached:
            torch.autograd.backward([one for one, _ in reached], [gradient for _, gradient in reached])
        passed = [(edge, leaf.grad.to("cpu")) for edge, leaf in live.leaves if leaf.grad is not None]
        if passed:
            # Another part of what lies between blocks may still come this way.
            torch.autograd.backward([one for one, _ in passed], [gradient for _, gradient in passed], retain_graph=True)

    def _repeat(self, call: Call, device: str | None = None) -> tuple[Any, _Live]:
        """A call that was put aside, now recorded: what it answers, and what of that may have a gradient."""
        leaves: list[tuple[GradientEdge, torch.Tensor]] = []

        def given(value: Any) -> Any:
            if not isinstance(value, _Given):
                return value.to(device or self.device, copy=True) if isinstance(value, torch.Tensor) else value
            leaf = self._shelf.take(value.kept).to(device or self.device).requires_grad_()
            leaves.append((value.edge, leaf))
            return leaf.clone()  # which may be written to

        with torch.enable_grad():
            args, kwargs = _mapped(call.args, given), _mapped(call.kwargs, given)
            before = _dict_entries(args, kwargs)
            output = call.module(*args, **kwargs)
        self._require_nothing_hidden(call.module)
        written = [value for _, _, value in _written(args, kwargs, before)]
        return output, _Live(_floating([output, written]), leaves)

    def _require_nothing_hidden(self, module: nn.Module) -> None:
        for part in module.modules():
            if any(isinstance(one, torch.Tensor) and one.requires_grad for one in vars(part).values()):
                raise UnsupportedArchitecture(f"{type(part).__name__} keeps what it computes", where="config.json")

    @torch.no_grad()
    def run_call(self, call: Call) -> tuple[Any, Call]:
        """As in a walk; remembers what dicts had, to tell what the block writes into them."""
        args, kwargs = (_mapped(one, partial(_copied, self.device)) for one in (call.args, call.kwargs))
        used = _Used(call.module, args, kwargs, _dict_entries(args, kwargs))
        return call.module(*args, **kwargs), used

    def _passing(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return super()._passing(ids)

    def _advance(self, lane: Lane, output: Any, used: Call) -> None:
        call = lane.call
        if lane is self._probe or call is None or not isinstance(used, _Used):
            super()._advance(lane, output, used)
            return
        step = _Step(self._put_aside(call), [])
        self._tapes[self._lanes.index(lane)].append(step)
        answer = self._answers(_mapped(output, partial(_copied, "cpu")), step.cells)
        written = list(_written(used.args, used.kwargs, used.before))
        for at, key, value in written:
            (*call.args, *call.kwargs.values())[at][key] = self._answers(_copied("cpu", value), step.cells)
        del output, used, written
        self._go(lane, answer)

    def _answer_outside(self, lane: Lane, call: Call) -> Any:
        if lane is self._probe:
            return super()._answer_outside(lane, call)
        step = _Step(self._put_aside(call), [])
        self._tapes[self._lanes.index(lane)].append(step)
        return self._answers(_mapped(super()._answer_outside(lane, call), partial(_copied, "cpu")), step.cells)

    def _answers(self, output: Any, cells: list[_Cell]) -> Any:
        """The same with floating tensors as beginnings of a graph, each with a new cell."""

        def begin(value: Any) -> Any:
            if not _is_floating(value):
                return value
            cells.append(_Cell())
            with torch.enable_grad():
                own = value.detach() if value.requires_grad else value
                return _Answer.apply(self._anchor, [own], cells[-1])  # type: ignore[no-untyped-call]

        return _mapped(output, begin)

    def _put_aside(self, call: Call) -> Call:
        """A call as it is now; UnsupportedArchitecture where an object could carry what has a gradient."""

        def put(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                if not value.requires_grad:
                    return value
                return _Given(get_gradient_edge(value), self._shelf.put(value))
            if value is None or isinstance(value, _PLAIN):
                return value
            raise UnsupportedArchitecture(f"its blocks share a {type(value).__name__}", where="config.json")

        return Call(call.module, _mapped(call.args, put), _mapped(call.kwargs, put))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Nested dicts, lists and tuples with everything else in them changed."""
    if isinstance(value, DICTS):
        made = copy.copy(value)
        for key, item in value.items():
            made[key] = _mapped(item, change)
        return made
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        items = [_mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return change(value)


def _copied(device: str, value: Any) -> Any:
    return value.to(device, copy=True) if isinstance(value, torch.Tensor) else value


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _floating(value: Any) -> list[torch.Tensor]:
    """The floating tensors in nested values, in order."""
    found: list[torch.Tensor] = []
    _mapped(value, lambda one: found.append(one) if _is_floating(one) else None)
    return found


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) else 0


def _dict_entries(args: Any, kwargs: Any) -> dict[tuple[int, Any], tuple[Any, int]]:
    """What dicts among the arguments hold: by the argument's number and the key."""
    given = [(at, one) for at, one in enumerate((*args, *kwargs.values())) if isinstance(one, DICTS)]
    return {(at, key): (item, _version(item)) for at, one in given for key, item in one.items()}


def _written(
    args: Any, kwargs: Any, before: dict[tuple[int, Any], tuple[Any, int]]
) -> Iterator[tuple[int, Any, torch.Tensor]]:
    """The entries of these dicts that are not what they were: (argument, key, value)."""
    for (at, key), (item, version) in _dict_entries(args, kwargs).items():
        known, then = before.get((at, key), (None, 0))
        if item is not known or version != then:
            yield at, key, item
