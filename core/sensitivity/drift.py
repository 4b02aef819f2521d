"""Statistics of a block's layers where what comes before them is quantised already, beside the reference's.

Two walks stand at the same block, the reference's and that of the candidate, whose earlier tensors are as they will be
stored. Layers that share an input form a stage; a stage is measured when those before it are in place. Of inputs x in
the reference and h in the candidate it has E[h h^T], E[x h^T], and for layers that write to the residual stream E[(r -
r_h) h^T], the difference of what their output is added to (data-aware rounding, section 4.8). Statistics of layers
that read the stream together, as q, k and v do, may be mixed with the reference's and weighted by attention (4.9).

Promise: every batch is run as far as the stage needs it, in order; products of bf16 as in `core.sensitivity.inputs`.
Memory: the statistics of a stage, one batch. A layer is left out whose tokens are not the block's (experts to which
tokens are routed), or which is called more than once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from core.errors import NonFiniteWeights
from core.sensitivity.additions import Additions
from core.sensitivity.attention import AttentionCalls, attention_received
from core.sensitivity.collector import recognise
from core.sensitivity.products import Gram, Products
from core.sensitivity.walk import Block, BlockWalk


@dataclass(frozen=True)
class Mixing:
    """How statistics of q, k and v are made up (section 4.9), and whether layers make up for the residual stream.

    `drift`: the candidate's share in them, 1 - eps_qr. `attention`: the share that is weighted by the attention which
    tokens receive in the reference. Both in [0, 1].
    """

    drift: float = 1.0
    attention: float = 0.0
    residual: bool = True


@dataclass(frozen=True)
class Layer:
    """`path` in the block; `names`: its tensors in the checkpoint; `writes` to the residual stream."""

    path: str
    names: tuple[str, ...]
    writes: bool


@dataclass(frozen=True)
class Stage:
    """Layers that multiply with the same input, in the order of their calls.

    `attends`: attention comes next. `transposed`: their matrices are stored with the inputs as rows.
    """

    layers: tuple[Layer, ...]
    attends: bool = False
    transposed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All their tensors."""
        return tuple(name for layer in self.layers for name in layer.names)


@dataclass(frozen=True)
class DriftStatistics:
    """Over `tokens`: `covariance` E[h h^T], `cross` E[x h^T], None where x = h; fp64 (inputs, inputs) on the CPU.

    `residuals`: E[(r - r_h) h^T], fp64 (outputs, inputs), by tensor. `transposed`: see `Stage`.
    """

    covariance: torch.Tensor
    cross: torch.Tensor | None
    residuals: dict[str, torch.Tensor]
    tokens: int
    transposed: bool = False
    notes: tuple[str, ...] = ()


class _Enough(Exception):
    """Ends a run of which nothing more is needed."""


@dataclass
class _Seen:
    """Of one run: the input of a stage (tokens, inputs), what layers add to, and the attention that tokens receive."""

    given: torch.Tensor | None = None
    residuals: dict[str, torch.Tensor] = field(default_factory=dict)
    attention: torch.Tensor | None = None


class BlockPair:
    """One block in both walks."""

    def __init__(self, reference: tuple[BlockWalk, Block], candidate: tuple[BlockWalk, Block]) -> None:
        self._reference, self._candidate = reference, candidate

    def stages(self, wanted: frozenset[str]) -> list[Stage]:
        """Of those layers that have one of the wanted tensors, by one batch of the reference."""
        walk, block = self._reference
        if walk.is_head(block.module) and type(block.module).forward is nn.Linear.forward:
            names = tuple(name for name, _ in walk.hollow.stored(block.module, "weight") if name in wanted)
            return [Stage((Layer("", names, writes=False),))] if names else []
        return _Survey(walk, block).stages(wanted)

    def measure(self, stage: Stage, mixing: Mixing, tell: Callable[[int], None]) -> DriftStatistics | None:
        """Of one stage, with `tell(batch)` before each; None where tokens are not the same in both."""
        sums: _Sums | None = None
        for batch in range(self._reference[0].batches):
            tell(batch)
            x, h = (self._seen(*one, stage, batch, mixing) for one in (self._reference, self._candidate))
            if x.given is None or h.given is None or x.given.shape != h.given.shape:
                return None
            sums = sums or _Sums(stage, x.given, mixing if stage.attends else Mixing())
            sums.add(x.given, h.given, (x, h))
        return None if sums is None else sums.result()

    def _seen(self, walk: BlockWalk, block: Block, stage: Stage, batch: int, mixing: Mixing) -> _Seen:
        seen, first = _Seen(), block.module.get_submodule(stage.layers[0].path)
        writes = [layer for layer in stage.layers if layer.writes and mixing.residual]
        weighs = mixing.attention > 0 and stage.attends and walk is self._reference[0]

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            seen.given = given.detach().flatten(0, -2).clone()
            if not writes and not weighs:
                raise _Enough

        with ExitStack() as stack:
            stack.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
            additions = stack.enter_context(Additions()) if writes else None
            for layer in writes:
                module = block.module.get_submodule(layer.path)
                stack.callback(module.register_forward_hook(_watcher(additions, layer.path)).remove)
            if weighs:
                around = block.module.get_submodule(stage.layers[0].path.rpartition(".")[0])
                stack.callback(around.register_forward_hook(_attention_keeper(seen)).remove)
            with suppress(_Enough):
                walk.run_call(block.call(batch))
        if additions is not None:
            seen.residuals = {path: one.flatten(0, -2) for path, one in additions.found.items()}
        return seen


def _watcher(additions: Additions | None, key: str) -> Any:
    def watch(_module: nn.Module, _args: Any, output: Any) -> None:
        if additions is not None and isinstance(output, torch.Tensor):
            additions.watch(key, output)

    return watch


def _attention_keeper(seen: _Seen) -> Any:
    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.attention = attention_received(output)

    return keep


class _Survey:
    """Which layers of a block share an input, and which write to the residual stream, seen in one batch."""

    def __init__(self, walk: BlockWalk, block: Block) -> None:
        self._walk, self._block = walk, block
        self._calls: dict[str, tuple[torch.Tensor, int, bool]] = {}
        self._unfit: set[str] = set()
        self._attending: set[tuple[int, int]] = set()

    def stages(self, wanted: frozenset[str]) -> list[Stage]:
        """By the order of their first calls."""
        call, additions = self._block.call(0), Additions()
        with ExitStack() as stack:
            for path, module in self._block.module.named_modules():
                weight = module._parameters.get("weight")
                if weight is not None and weight.ndim == 2:
                    hook = self._hook(path, additions)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            stack.enter_context(AttentionCalls(self._attend))
            stack.enter_context(additions)
            self._walk.run_call(call)
        tokens = _tokens(call.args, call.kwargs)
        found: dict[tuple[int, int, bool], list[Layer]] = {}
        for path, (given, version, transposed) in self._calls.items():
            names = self._names(path, wanted)
            if names and path not in self._unfit and given.flatten(0, -2).shape[0] == tokens:
                writes = path in additions.found
                found.setdefault((id(given), version, transposed), []).append(Layer(path, names, writes))
        return [Stage(tuple(layers), key[:2] in self._attending, key[2]) for key, layers in found.items()]

    def _attend(self) -> None:
        """What was multiplied with last before attention are its values, keys or queries."""
        for given, version, _ in list(self._calls.values())[-1:]:
            self._attending.add((id(given), version))

    def _names(self, path: str, wanted: frozenset[str]) -> tuple[str, ...]:
        stored = self._walk.hollow.stored(self._block.module.get_submodule(path), "weight")
        return tuple(name for name, _ in stored if name in wanted)

    def _hook(self, path: str, additions: Additions) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            kind = recognise(module, module._parameters["weight"], given, output)  # type: ignore[arg-type]
            if path in self._calls or kind is None or kind[0] == "table" or not isinstance(given, torch.Tensor):
                self._unfit.add(path)
                return
            self._calls[path] = given, given._version, kind[0] == "columns"
            additions.watch(path, output)

        return see


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many tokens a block is called with, by the hidden states (sequences, length, features)."""
    first = next(iter((*args, *kwargs.values())), None)
    return first.flatten(0, -2).shape[0] if isinstance(first, torch.Tensor) and first.ndim > 1 else -1


class _Sums:
    """Statistics of one stage, summed up batch by batch."""

    def __init__(self, stage: Stage, given: torch.Tensor, mixing: Mixing) -> None:
        self._stage, self._mixing, size = stage, mixing, given.shape[-1]
        self._ours, self._theirs = Gram(size, given.device), Gram(size if mixing.drift < 1 else 0, given.device)
        self._cross = Products(size, size, given.device)
        self._residuals: dict[str, Products] = {}
        self._same, self._unweighted, self._tokens = True, False, 0

    def add(self, x: torch.Tensor, h: torch.Tensor, seen: tuple[_Seen, _Seen]) -> None:
        """A batch's inputs (tokens, inputs) in the reference and in the candidate, and what else was seen in both."""
        roots = self._roots(seen[0].attention)
        self._same, self._tokens = self._same and torch.equal(x, h), self._tokens + len(x)
        x, h = (one if roots is None else roots * one for one in (x, h))
        self._ours.add(h)
        if self._theirs.size:
            self._theirs.add(x)
        self._cross.add(x, h)
        for layer in self._stage.layers:
            before, now = (one.residuals.get(layer.path) for one in seen)
            if before is not None and now is not None:
                owed = before - now if roots is None else roots * (before - now)
                if layer.path not in self._residuals:
                    self._residuals[layer.path] = Products(owed.shape[-1], h.shape[-1], h.device)
                self._residuals[layer.path].add(owed, h)

    def _roots(self, attention: torch.Tensor | None) -> torch.Tensor | None:
        """Square roots of the weights of tokens (tokens, 1), whose mean is 1; None where all count alike."""
        if not self._mixing.attention:
            return None
        if attention is None:
            self._unweighted = True
            return None
        return (self._mixing.attention * attention + (1 - self._mixing.attention)).sqrt()[:, None]

    def result(self) -> DriftStatistics:
        """Means over all tokens; NonFiniteWeights where inputs are not numbers."""
        if not (self._ours.finite and self._theirs.finite):
            raise NonFiniteWeights("its inputs are not numbers", where=self._stage.names[0])
        share, covariance, cross = self._mixing.drift, _matrix(self._ours), self._cross.mean(self._tokens)
        if self._theirs.size:
            reference = _matrix(self._theirs)
            covariance, cross = torch.lerp(reference, covariance, share), torch.lerp(reference, cross, share)
        residuals = {
            name: share * self._residuals[layer.path].mean(self._tokens)
            for layer in self._stage.layers
            if layer.path in self._residuals
            for name in layer.names
        }
        return DriftStatistics(
            covariance,
            None if self._same else cross,
            residuals,
            self._tokens,
            self._stage.transposed,
            ("the network tells no attention: all tokens count alike",) if self._unweighted else (),
        )


def _matrix(gram: Gram) -> torch.Tensor:
    return torch.cat(list(gram.panels())).double()
