"""A forward pass of many windows through a checkpoint's network, block by block, without ever holding the network.

Every batch of windows is a forward pass of the network's own in a thread of its own, which waits wherever it calls a
block: so no architecture's loop, masks or arguments are written down here. When all batches wait at a block, it gets
its weights, the caller runs it as often as it likes, and the batches go on with what its last run answered. The head,
which answers logits, is the last block. Threads take turns: one at a time, in the order of the batches.

Promise: answers are those of the whole network, and do not depend on how threads are scheduled. Memory: the largest
block (a table of embeddings counts as one) on the device; inputs of a block, its answers and what each pass itself
keeps on the host. A network that is not causal is refused, as are those that cannot be loaded. What a batch raises is
raised here; whoever leaves the walk early leaves no thread behind. It knows nothing about caches or gradients.
"""

from __future__ import annotations

import copy
import threading
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from core.errors import BitmillError, UnsupportedArchitecture
from core.evaluation.text import Windows
from core.hollow import HollowNetwork
from core.network_tensors import Weights
from core.networks import causality_probe, check_causal, check_token_ids, forward_pass, next_token_logits
from core.sensitivity.collector import head_of
from core.storage.checkpoint import CheckpointIndex

DICTS = (dict, UserDict)  # in which blocks leave things for each other
_BATCH_TOKENS = {"cpu": 1024}
_BATCH_TOKENS_ELSEWHERE = 8192
_HERE = threading.local()


@dataclass(frozen=True)
class Call:
    """What a batch calls a block with, on the CPU."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Abandoned(BaseException):
    """Unwinds a batch that nobody waits for any more; no `except Exception` of a model may catch it."""


class Lane:
    """A forward pass in a thread that runs only while `go` waits for it. `call`: what it waits for, None at its end.

    `keeps`: whether `kept` has what the pass made, when it has ended.
    """

    def __init__(self, forward: Callable[[], Any]) -> None:
        self.call: Call | None = None
        self.keeps, self.kept = False, None
        self._forward = forward
        self._calls: SimpleQueue[Call | BaseException | None] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._travel, daemon=True)
        self._thread.start()

    def go(self, answer: Any = None) -> None:
        """Answer its call, and wait for the next; raises what the pass raised."""
        self.call = None
        self._answers.put(answer)
        del answer
        came = self._calls.get()
        if isinstance(came, BaseException):
            raise came
        self.call = came

    def ask(self, call: Call) -> Any:
        """In the thread: wait for the answer to a call."""
        self._calls.put(call)
        del call
        if (answer := self._answers.get()) is _Abandoned:
            raise _Abandoned
        return answer

    def stop(self) -> None:
        """Unwind the pass and wait for the end of its thread."""
        self.call = None
        self._answers.put(_Abandoned)
        self._thread.join()

    def _travel(self) -> None:
        if self._answers.get() is _Abandoned:
            return
        _HERE.lane = self
        # What runs here is little, and a pool of threads per batch would be many.
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                made = self._forward()
                self.kept = made if self.keeps else None
                del made
        except _Abandoned:
            return
        except BaseException as error:  # noqa: BLE001  raised where it is waited for
            self._calls.put(error)
        else:
            self._calls.put(None)


class Block:
    """A part of the network that has its weights now. `name`: its path; `names`: the checkpoint's tensors in it."""

    def __init__(self, walk: BlockWalk, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.names = walk.hollow.names(module)
        self._walk = walk
        self._kept: list[tuple[Any, Call]] | None = None
        self._done = False

    def run(
        self,
        before: Callable[[int], None] | None = None,
        after: Callable[[int, Any], None] | None = None,
        *,
        last: bool = False,
    ) -> None:
        """Run every batch in order; `before(batch)` and `after(batch, output)`, which is on the device.

        Torch hooks on the module see these runs and no others. `last`: each batch goes on at once, which keeps no
        second set of activations; the block cannot be run again then.
        """
        self._require()
        self._kept, kept = None, []
        for batch in range(self._walk.batches):
            if before:
                before(batch)
            output, used = self._walk.run_call(self.call(batch))
            if after:
                after(batch, output)
            if last:
                self._walk.answer(batch, output, used)
            elif not self._walk.is_head(self.module):
                kept.append((_moved(output, "cpu"), used))
            del output, used
        self._kept, self._done = kept, last

    def call(self, batch: int) -> Call:
        """What a batch calls it with, on the CPU."""
        self._require()
        return self._walk.waiting(batch)

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Other values for some of its tensors, in the checkpoint's shapes; an internal error for others."""
        self._walk.hollow.load(self.module, values)

    def finish(self) -> None:
        """Hand on what the last run answered; run if there was none. The head's answers are nobody's."""
        if self._done or self._walk.is_head(self.module):
            return
        if self._kept is None:
            self.run(last=True)
            return
        self._done = True
        self._kept.reverse()
        for batch in range(self._walk.batches):
            self._walk.answer(batch, *self._kept.pop())

    def _require(self) -> None:
        if self._done:
            raise BitmillError("the batches have gone on", where=self.name)


class BlockWalk:
    """A context manager to iterate over once: each `Block` holds its weights until the next is asked for.

    `weights(name)` instead of the stored tensors; `batch` sequences in a pass, None for what suits their length. Two
    walks may be iterated over in lockstep. Raises what `load_network` raises, InvalidCheckpoint when the windows
    have tokens beyond the vocabulary, UnsupportedArchitecture when batches go different ways.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        windows: Windows,
        *,
        device: str,
        dtype: torch.dtype,
        weights: Weights | None = None,
        batch: int | None = None,
    ) -> None:
        self.hollow = HollowNetwork(index, dtype=dtype, weights=weights)
        self.network = self.hollow.network
        check_token_ids(self.network, windows.ids)
        tokens = _BATCH_TOKENS.get(torch.device(device).type, _BATCH_TOKENS_ELSEWHERE)
        self._ids = torch.split(windows.ids, batch or max(1, tokens // windows.ids.shape[1]))
        self._index, self.device = index, device
        self._blocks, self._head = blocks_of(self.network)
        self._names = {module: name for name, module in self.network.named_modules()}
        self._lanes: list[Lane] = []
        self._probe: Lane | None = None
        self._borrowed: list[nn.Module] = []

    def __enter__(self) -> Self:
        for module in _ancestors(self.network, self._blocks):
            self.hollow.materialise(module, alone=True)
        for module in (*self._blocks, *_outside(self.network, self._blocks)):
            # Unlike a hook, or a forward put in its place, this takes the whole call: hooks run with the block only.
            module._compiled_call_impl = partial(self._called, module)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._abandon()
        self.hollow.release(self.network)
        for module in self.network.modules():
            module._compiled_call_impl = None

    @property
    def batches(self) -> int:
        return len(self._ids)

    def split(self, ids: Iterable[torch.Tensor]) -> None:
        """Other batches, before it begins: the token ids (sequences, length) of each, all of them in the windows."""
        self._ids = tuple(ids)

    def __len__(self) -> int:
        """How many blocks come, if every one is called once."""
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        self._depart()
        module = self._meeting()
        while module is not None:
            self._give_back()
            self.hollow.materialise(module, self.device)
            try:
                self._run_ahead(module)
                block = Block(self, module, self._names[module])
                yield block
                block.finish()
            finally:
                self.hollow.release(module)
            module = None if self.is_head(module) else self._meeting()
        self._abandon()

    def is_head(self, module: nn.Module) -> bool:
        """Whether a block is the one that answers logits."""
        return module is self._head

    @property
    def names_outside(self) -> frozenset[str]:
        """The checkpoint's tensors that are not in a block alone: used before, around or between them."""
        inside = {name for block in self._blocks for name in self.hollow.names(block)}
        around = {name for part in _outside(self.network, self._blocks) for name in self.hollow.names(part)}
        return frozenset(self.hollow.names(self.network)) - inside | around

    def tell_attention(self) -> None:
        """Let attention layers answer their probabilities, as they do where these are computed one after another."""
        self.network.set_attn_implementation("eager")  # type: ignore[operator]

    def waiting(self, batch: int) -> Call:
        """What a batch waits for; an internal error once it has gone on."""
        return _call_of(self._lanes[batch])

    @torch.no_grad()
    def run_call(self, call: Call) -> tuple[Any, Call]:
        """The answer to a call on the device, and the call itself as it was used: on the device, and maybe changed."""
        used = Call(call.module, _moved(call.args, self.device), _moved(call.kwargs, self.device))
        return call.module(*used.args, **used.kwargs), used

    def answer(self, batch: int, output: Any, used: Call) -> None:
        """Let a batch go on to its next block."""
        self._advance(self._lanes[batch], output, used)

    def conclude(self, batch: int, output: Any) -> torch.Tensor:
        """The logits that the network makes of what its head answered a batch, which ends; where that answer lies."""
        lane = self._lanes[batch]
        lane.keeps = True
        self._go(lane, output)
        logits, lane.kept = lane.kept, None
        if not isinstance(logits, torch.Tensor):
            raise self._different_ways()
        return logits

    def _called(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        lane: Lane | None = getattr(_HERE, "lane", None)
        if lane is None:
            return module._call_impl(*args, **kwargs)
        if any(isinstance(one, torch.Tensor) and one.is_meta for one in (*args, *kwargs.values())):
            raise UnsupportedArchitecture(
                "the network puts its inputs where its weights lie", where=self._names[module]
            )
        return lane.ask(Call(module, args, kwargs))

    def _depart(self) -> None:
        threads = torch.get_num_threads()
        self._probe = Lane(self._probing)
        self._lanes = [Lane(partial(self._passing, ids)) for ids in self._ids]
        try:
            for lane in (self._probe, *self._lanes):
                self._go(lane)
        finally:
            torch.set_num_threads(threads)  # of threads to come; a lane's choice holds for those too

    def _probing(self) -> None:
        check_causal(self._index, next_token_logits(self.network, causality_probe(self.network)))

    def _passing(self, ids: torch.Tensor) -> torch.Tensor:
        return next_token_logits(self.network, ids)

    def _run_ahead(self, module: nn.Module) -> None:
        """Take the two short sequences that tell whether the network is causal one block further."""
        if self._probe is None or self._probe.call is None or self._probe.call.module is not module:
            raise self._different_ways()
        with forward_pass(self._index):
            output, used = self.run_call(self._probe.call)
        self._advance(self._probe, output, used)
        came = _first(self._probe.call)
        if isinstance(came, torch.Tensor) and came.ndim == 3 and came.shape[:2] == (2, 2) and came.is_floating_point():
            check_causal(self._index, came)

    def _advance(self, lane: Lane, output: Any, used: Call) -> None:
        _write_back(_call_of(lane), used)
        output = _moved(output, "cpu")
        del used
        self._go(lane, output)

    @torch.no_grad()
    def _go(self, lane: Lane, answer: Any = None) -> None:
        """To the next block; what is called on the way gets its weights, and keeps them until all batches have come."""
        with forward_pass(self._index):
            lane.go(answer)
        del answer
        while (call := lane.call) is not None and call.module not in self._blocks:
            self.hollow.materialise(call.module)
            self._borrowed.append(call.module)
            with forward_pass(self._index):
                lane.go(self._answer_outside(lane, call))

    def _answer_outside(self, _lane: Lane, call: Call) -> Any:
        """What a module answers that is neither a block nor in one; it has its weights, on the CPU."""
        return call.module(*call.args, **call.kwargs)

    def _give_back(self) -> None:
        while self._borrowed:
            self.hollow.release(self._borrowed.pop())

    def _meeting(self) -> nn.Module | None:
        """The block at which all batches wait; None when they have all ended."""
        places = {None if lane.call is None else lane.call.module for lane in self._lanes}
        if len(places) > 1:
            raise self._different_ways()
        return places.pop() if places else None

    def _different_ways(self) -> UnsupportedArchitecture:
        return UnsupportedArchitecture(
            "the network calls its blocks in an order that depends on the text", where="config.json"
        )

    def _abandon(self) -> None:
        lanes = [*self._lanes, *([self._probe] if self._probe else [])]
        self._lanes, self._probe, self._borrowed = [], None, []
        for lane in lanes:
            lane.stop()


def _call_of(lane: Lane) -> Call:
    if lane.call is None:
        raise BitmillError("a batch that has ended was asked for its call")
    return lane.call


def _first(call: Call | None) -> Any:
    """The first thing that a block is called with."""
    return None if call is None else next(iter((*call.args, *call.kwargs.values())), None)


def blocks_of(network: nn.Module) -> tuple[dict[nn.Module, None], nn.Module | None]:
    """The blocks in order, the head last, and the head; the network itself where it has no list of blocks."""
    lists = [part for part in network.modules() if isinstance(part, nn.ModuleList)]
    inner = {module for part in lists for child in part for module in child.modules()}
    outermost = [part for part in lists if part not in inner]
    if not outermost:
        return {network: None}, None
    chosen = max(outermost, key=lambda part: sum(one.numel() for one in part.parameters()))
    blocks = dict.fromkeys(chosen)
    head = head_of(network)
    if head is None or head is network or any(head in block.modules() for block in blocks):
        return blocks, None
    return blocks | {head: None}, head


def _ancestors(module: nn.Module, blocks: Mapping[nn.Module, None]) -> Iterator[nn.Module]:
    """The modules around blocks, from the network itself inwards."""
    if module not in blocks and any(inner in blocks for inner in module.modules()):
        yield module
        for child in module.children():
            yield from _ancestors(child, blocks)


def _outside(module: nn.Module, blocks: Mapping[nn.Module, None]) -> Iterator[nn.Module]:
    """The modules with weights that are neither blocks, nor in one, nor around one."""
    around = set(_ancestors(module, blocks))
    inside = {inner for block in blocks for inner in block.modules()}
    for part in module.modules():
        if part not in around and part not in inside and next(part.parameters(), None) is not None:
            yield part


def _moved(value: Any, device: str) -> Any:
    """A copy of nested arguments whose tensors are on the device; other objects are passed as they are."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, DICTS):
        moved = copy.copy(value)
        for key, item in value.items():
            moved[key] = _moved(item, device)
        return moved
    if isinstance(value, tuple | list):
        items: Iterable[Any] = [_moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _write_back(call: Call, used: Call) -> None:
    """What a block left for later ones in a dict among its arguments."""
    for kept, changed in zip((*call.args, *call.kwargs.values()), (*used.args, *used.kwargs.values()), strict=True):
        if isinstance(kept, DICTS):
            for key, item in changed.items():
                if item is not kept.get(key):
                    kept[key] = _moved(item, "cpu")
