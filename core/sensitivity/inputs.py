"""E[x xᵀ] of everything that a network's matrices multiply with, gathered block by block into one file.

Inputs are rounded to bf16, whose products fp32 has exactly; sums of a chunk of tokens are fp32, those of all chunks
fp64. Layers that get the very same tensor share one statistic (q, k, v; gate, up). Experts in stacked parameters have
statistics of their own, from the tokens that were routed to each, whether the checkpoint stacks them too or has a
tensor for each. Layers are recognised by what they compute, in either orientation. Source: data-aware-rounding,
section 2.

Promise: every matrix of the checkpoint has statistics or a reason. Memory: that of the walk, and 8 bytes for each
element of the statistics of one block. Weights are untouched and hooks are gone afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from core.errors import NonFiniteWeights
from core.evaluation.text import Windows
from core.network_tensors import Weights
from core.sensitivity.collector import Kind, recognise
from core.sensitivity.covariance import CovarianceWriter
from core.sensitivity.experts import SECOND, Experts
from core.sensitivity.fisher import deterministic
from core.sensitivity.products import Gram
from core.sensitivity.walk import Block, BlockWalk
from core.storage.checkpoint import CheckpointIndex

Progress = Callable[[float, str], None]

_EMBEDDING = "an embedding has no input to weigh errors by"
_BIAS = "it is added, and has no input to weigh errors by"


def gather_covariances(
    index: CheckpointIndex,
    windows: Windows,
    path: Path,
    *,
    device: str,
    dtype: torch.dtype,
    progress: Progress,
    weights: Weights | None = None,
    batch: int | None = None,
) -> None:
    """Write a new file of `core.sensitivity.covariance` from every token of the windows.

    `progress` is told of every batch of every block. Raises what `BlockWalk` raises, and NonFiniteWeights with the name
    of a tensor whose inputs are not numbers.
    """
    matrices = frozenset(name for name in index.names if len(index.tensors[name].shape) > 1)
    with (
        deterministic(),
        BlockWalk(index, windows, device=device, dtype=dtype, weights=weights, batch=batch) as walk,
        CovarianceWriter(path, matrices, _stacked(walk)) as writer,
    ):
        for at, block in enumerate(walk):
            told = partial(_tell, progress, at, max(len(walk), at + 1), walk.batches, block.name)
            with _BlockInputs(walk, block) as inputs:
                inputs.gather(told)
            inputs.write(writer, matrices)
            del inputs  # before the next block gets its weights
        embeddings = [module for module in walk.network.modules() if isinstance(module, nn.Embedding)]
        tables = {name for module in embeddings for name in walk.hollow.names(module)}
        for name in sorted(matrices - writer.known):
            writer.refuse(name, _EMBEDDING if name in tables else "it lies outside the blocks of the network")


def _stacked(walk: BlockWalk) -> dict[str, int]:
    """The tensors of the checkpoint that may stack experts, and how many."""
    return {
        name: len(parameter)
        for module in walk.network.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3
        for name, place in walk.hollow.stored(module, key)
        if place.expert is None
    }


def _tell(progress: Progress, at: int, blocks: int, batches: int, name: str, batch: int) -> None:
    progress((at + batch / batches) / blocks, f"{name}, batch {batch + 1} of {batches}")


@dataclass
class _Stack:
    """The experts of one tensor: how many it has, those that saw tokens, and its orientation."""

    count: int
    transposed: bool
    grams: dict[int, Gram]


@dataclass
class _Use:
    """A matrix's part in a statistic: how many tokens it saw itself, and its orientation."""

    gram: Gram
    transposed: bool
    tokens: int = 0


class _BlockInputs:
    """Hooks on one block; a context manager, within which `gather` runs the block."""

    def __init__(self, walk: BlockWalk, block: Block) -> None:
        self._walk, self._block = walk, block
        self._handles: list[RemovableHandle] = []
        self._kinds: dict[nn.Module, Kind | None] = {}
        self._experts: dict[nn.Module, bool] = {}
        self._uses: dict[tuple[str, ...], _Use] = {}
        self._seen: dict[int, tuple[torch.Tensor, int, Gram]] = {}
        self._reasons: dict[str, str] = {}
        self._by_expert: dict[tuple[nn.Module, str], dict[int | None, tuple[str, ...]]] = {}
        self._stacks: dict[str, _Stack] = {}

    def __enter__(self) -> Self:
        for module in self._block.module.modules():
            shapes = {key: value.ndim for key, value in module._parameters.items() if value is not None}
            if shapes.get("weight") == 2:
                self._handles.append(module.register_forward_hook(self._linear, with_kwargs=True))
            elif 3 in shapes.values():
                self._handles.append(module.register_forward_hook(self._stacked, with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    def gather(self, tell: Callable[[int], None]) -> None:
        """Sum up every batch. A head is not computed: its inputs are all that it needs."""
        alone = self._block.module
        if not self._walk.is_head(alone) or type(alone).forward is not nn.Linear.forward:
            self._block.run(tell, lambda _batch, _output: self._seen.clear(), last=True)
            return
        for batch in range(self._walk.batches):
            tell(batch)
            call = self._block.call(batch)
            given = _first(call.args, call.kwargs).to(self._walk.device)
            self._add(self._names(alone, "weight"), given.flatten(0, -2), given)
            self._seen.clear()

    def write(self, writer: CovarianceWriter, matrices: frozenset[str]) -> None:
        """Put what was found of these tensors into the file; what an earlier block had too is refused."""
        mine = matrices.intersection(self._block.names)
        again = writer.known & mine
        for name in again:
            writer.refuse(name, "its block is called more than once")
        shared: dict[int, dict[tuple[str, ...], _Use]] = {}
        for names, use in self._uses.items():
            if not again and self._is_right(names, use):
                shared.setdefault(id(use.gram), {})[names] = use
        for users in shared.values():
            self._write_one(writer, users)
        for name in sorted(mine.intersection(self._stacks) - again):
            self._write_stack(writer, name, self._stacks[name])
        for name in sorted(mine - writer.known):
            writer.refuse(name, self._reasons.get(name, "no layer that multiplies with it was called"))

    def _is_right(self, names: tuple[str, ...], use: _Use) -> bool:
        if use.tokens != use.gram.tokens:
            self._refuse(names, "the input that it shares with other layers is not always the same")
        elif not use.tokens:
            self._refuse(names, "no token reached it")
        return use.tokens == use.gram.tokens > 0

    def _write_one(self, writer: CovarianceWriter, users: dict[tuple[str, ...], _Use]) -> None:
        members = {name: (use.tokens, use.transposed) for names, use in users.items() for name in names}
        gram, key = next(iter(users.values())).gram, min(members)
        if not gram.finite:
            raise NonFiniteWeights("its inputs are not numbers", where=key)
        writer.write(key, gram.size, gram.panels(), members)

    def _write_stack(self, writer: CovarianceWriter, name: str, stack: _Stack) -> None:
        for expert, gram in sorted(stack.grams.items()):
            if not gram.finite:
                raise NonFiniteWeights(f"the inputs of expert {expert} are not numbers", where=name)
            writer.write_expert(name, expert, gram.size, gram.panels())
        tokens = (stack.grams[at].tokens if at in stack.grams else 0 for at in range(stack.count))
        writer.stack(name, tokens, transposed=stack.transposed)

    def _names(self, module: nn.Module, key: str, expert: int | None = None) -> tuple[str, ...]:
        slot = (module, key)
        if slot not in self._by_expert:
            found: dict[int | None, tuple[str, ...]] = {}
            for name, place in self._walk.hollow.stored(module, key):
                found[place.expert] = (*found.get(place.expert, ()), name)
            self._by_expert[slot] = found
        return self._by_expert[slot].get(expert, ())

    def _refuse(self, names: tuple[str, ...], reason: str) -> None:
        for name in names:
            self._reasons.setdefault(name, reason)

    def _linear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        names, given = self._names(module, "weight"), _first(args, kwargs)
        if module not in self._kinds:
            found = recognise(module, module._parameters["weight"], given, output)  # type: ignore[arg-type]
            self._kinds[module] = None if found is None else found[0]
        kind = self._kinds[module]
        if kind is None:
            self._refuse(names, f"{type(module).__name__} is neither a linear layer nor an embedding")
        elif kind == "table":
            self._refuse(names, _EMBEDDING)
        elif names:
            self._add(names, given.flatten(0, -2), given, transposed=kind == "columns")

    def _stacked(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = Experts.of(module, [*args, *kwargs.values()])
        if module not in self._experts:
            self._experts[module] = call is not None and call.answers(output)
            self._explain(module, known=self._experts[module])
        if call is None or not self._experts[module]:
            return
        for expert, tokens in call.routed():
            self._add_expert(module, call, call.first, (expert, tokens))
            if self._names(module, SECOND, expert) or self._names(module, SECOND):
                self._add_expert(module, call, SECOND, (expert, call.between(expert, tokens)))

    def _add_expert(self, module: nn.Module, call: Experts, key: str, routed: tuple[int, torch.Tensor]) -> None:
        """Tokens of one expert's matrix, which has tensors of its own in the checkpoint or is a slice of one."""
        expert, x = routed
        if names := self._names(module, key, expert):
            self._add(names, x)
        for name in self._names(module, key):
            stack = self._stacks.setdefault(name, _Stack(call.count, call.transposed, {}))
            if expert not in stack.grams:
                stack.grams[expert] = Gram(x.shape[-1], x.device)
            stack.grams[expert].add(x)

    def _explain(self, module: nn.Module, *, known: bool) -> None:
        """Reasons for the tensors of a module with stacked parameters, should nothing be summed up of them."""
        for key, parameter in module._parameters.items():
            if parameter is None or parameter.ndim < 2:
                continue
            for name, place in self._walk.hollow.stored(module, key):
                if not known:
                    reason = f"{type(module).__name__} is not known to be linear layers"
                elif parameter.ndim < 3:
                    reason = _BIAS
                else:
                    reason = "no token was routed to its expert" + ("s" if place.expert is None else "")
                self._refuse((name,), reason)

    def _add(
        self, names: tuple[str, ...], x: torch.Tensor, given: torch.Tensor | None = None, *, transposed: bool = False
    ) -> None:
        """Tokens (tokens, inputs) of a matrix; `given`: the tensor they come from, which other layers may get too."""
        seen = None if given is None else self._seen.get(id(given))
        if given is not None and seen is not None and seen[1] != given._version:
            seen = None
        if (use := self._uses.get(names)) is None:
            gram = Gram(x.shape[-1], x.device) if seen is None else seen[2]
            use = self._uses[names] = _Use(gram, transposed)
        if seen is None or seen[2] is not use.gram:
            use.gram.add(x)
            if given is not None:
                self._seen[id(given)] = given, given._version, use.gram
        use.tokens += len(x)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)
