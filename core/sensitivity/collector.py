"""Squared gradients of matrices, summed from what hooks see: layer inputs on the way forward, output gradients back.

For a layer y = x Wᵀ (+ b) the sum over tokens of (g_t x_tᵀ)∘(g_t x_tᵀ) has row sums Σ_t g_t² ‖x_t‖²: the forward hook
keeps ‖x_t‖², the hook on the output's gradient adds. Each call keeps its own numbers, so layers that are called several
times, and activation checkpointing, are right. Layers of another kind than linear (either orientation) and embedding
are told apart by what they compute, not by their names, and reported with a reason instead of measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from core.networks import tensor_names as names_of
from core.sensitivity.sketch import Sketch, matrix_sum, scale_sums, table_scale_sums, table_sum

_TILE_ELEMENTS = 1 << 18  # of gradients squared at a time: they stay in the cache
_PROBED_TOKENS = 32
Kind = Literal["rows", "columns", "table"]


@dataclass
class _Matrix:
    """A parameter that is measured.

    `rows`: its sums (2 halves, first dimension), fp64. Of the sequences that were sketched: `together`, the sums over
    whole sequences and over single tokens; `scale` and `row_scales`, the sums for scaling all of it and each row.
    """

    rows: torch.Tensor
    together: torch.Tensor
    row_scales: torch.Tensor
    scale: torch.Tensor
    elements: int
    called: bool = False

    @classmethod
    def of(cls, parameter: torch.Tensor, device: str | torch.device) -> Self:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        count = parameter.shape[0]
        return cls(zeros(2, count), zeros(2), zeros(count), zeros(), parameter.numel())

    def add(self, half: int, rows: torch.Tensor) -> None:
        """Row sums of a call."""
        self.rows[half] += rows.to(self.rows.device)

    def add_whole(self, rows: torch.Tensor, whole: torch.Tensor, scales: tuple[torch.Tensor, torch.Tensor]) -> None:
        """What whole sequences of a call had, beside its row sums."""
        device = self.rows.device
        self.together += torch.stack((whole, rows.sum())).to(device)
        self.row_scales += scales[0].to(device)
        self.scale += scales[1].to(device)


@dataclass(frozen=True)
class Measured:
    """What was summed up of one tensor, on the CPU.

    `rows`: fp64 (2 halves, rows). `cross`: sums over whole sequences relative to those over single tokens, 1 where the
    layer's calls did not tell sequences apart. `row_scales` (rows,) and `scale`: sums over the sketched sequences.
    """

    rows: torch.Tensor
    elements: int
    cross: float
    row_scales: torch.Tensor
    scale: float


class Collector:
    """A context manager that hooks into every layer of a network which has a matrix. Use `batch` around each pass.

    Within it no parameter requires a gradient; afterwards each is as it was. A parameter may be another object with
    each call, as in a network whose weights come and go: `tensor_names` are those of the parameters that the network
    has now, `device` is where sums are kept; both as the network says if not given.
    """

    def __init__(
        self,
        network: nn.Module,
        tensor_names: Mapping[str, tuple[str, ...]] | None = None,
        device: str | None = None,
    ) -> None:
        self.reasons: dict[str, str] = {}
        self._network, self._half = network, 0
        self._handles: list[RemovableHandle] = []
        self._kinds: dict[nn.Module, tuple[Kind, float] | None] = {}
        self._last: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None
        self._sketch: Sketch | None = None
        self._head = head_of(network)
        self._tensor_names = tensor_names or names_of(network)
        parameters = dict(network.named_parameters())
        self._matrices = {
            name: _Matrix.of(one, device or one.device) for name, one in parameters.items() if one.ndim == 2
        }
        self._others = {name: one.ndim for name, one in parameters.items() if one.ndim > 2}
        self._layers = _layers(network, {id(one): name for name, one in parameters.items()})
        self._wanted = {name: one.requires_grad for name, one in parameters.items()}

    def __enter__(self) -> Self:
        self._network.requires_grad_(False)
        for module in self._layers:
            self._handles.append(module.register_forward_hook(self._forward, with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None
        for name, parameter in self._network.named_parameters():
            parameter.requires_grad_(self._wanted.get(name, False))

    @contextmanager
    def batch(self, half: int, seeds: Sequence[int] | None = None) -> Iterator[None]:
        """Passes within it add to that half (0 or 1). With a seed per sequence, whole sequences are summed up too."""
        self._half, self._sketch = half, None if seeds is None else Sketch(seeds)
        yield
        self._last = None

    def results(self) -> Iterator[tuple[str, Measured]]:
        """What was measured, by tensor; completes `reasons`."""
        for name, dimensions in self._others.items():
            self._refuse(name, f"its layers share a parameter of {dimensions} dimensions, which is not told apart")
        for name, matrix in self._matrices.items():
            tensor = self._tensor_names[name][0]
            if not matrix.called:
                self._refuse(name, "no layer that multiplies with it was called")
            elif tensor not in self.reasons:
                whole, single = matrix.together.tolist()
                cross = whole / single if single else 1.0
                scales = matrix.row_scales.cpu(), float(matrix.scale)
                yield tensor, Measured(matrix.rows.cpu(), matrix.elements, cross, *scales)

    def _refuse(self, parameter: str, reason: str) -> None:
        for name in self._tensor_names[parameter]:
            self.reasons.setdefault(name, reason)

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Remember what the call multiplied with, and wait for its output's gradient."""
        if not torch.is_grad_enabled():
            return None
        weight = module._parameters["weight"]
        given: Any = args[0] if args else next(iter(kwargs.values()), None)
        if weight is None or (kind := self._kind(module, weight, given, output)) is None:
            return None
        matrix = self._matrices[self._layers[module]]
        matrix.called = True
        leaf = not output.requires_grad
        if leaf:
            output.requires_grad_()
        answer = self._answer_to_keep(module, output)
        alone = kind[0] == "rows" and module is self._head
        call = _Call(matrix, self._half, given.detach(), answer, alone=alone)
        if kind[0] == "table":
            output.register_hook(partial(self._add_table, call, kind[1]))
        elif kind[0] == "rows":
            output.register_hook(partial(self._add_rows, call, *self._of_input(given, alone=call.alone)))
        else:
            output.register_hook(partial(self._add_columns, call, self._of_input(given)[1]))
        return output.clone() if leaf else None  # a leaf could not be written to in place by what follows

    def _answer_to_keep(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor | None:
        """W x without its bias, where whole sequences of the call can be told apart."""
        if self._sketch is None or not self._sketch.fits(output):
            return None
        bias = module._parameters.get("bias")
        return output.detach() if bias is None else output.detach() - bias

    def _kind(self, module: nn.Module, weight: torch.Tensor, given: Any, output: Any) -> tuple[Kind, float] | None:
        """What the layer computes, found out at its first call; None, and a reason, when it is nothing known."""
        if module not in self._kinds:
            self._kinds[module] = recognise(module, weight, given, output)
            if self._kinds[module] is None:
                reason = f"{type(module).__name__} is neither a linear layer nor an embedding"
                self._refuse(self._layers[module], reason)
        return self._kinds[module]

    def _of_input(self, given: torch.Tensor, *, alone: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """‖x_t‖² in fp32 (tokens,) and the input's projection; computed once for layers that share an input.

        `alone`: each position of the layer influences one label only, so nothing is left out and nothing is projected.
        """
        if self._last is None or self._last[0] is not given:
            wide = _wide(given.detach())
            flat = wide.flatten(0, -2)
            sketch = None if alone else self._sketch
            projection = sketch.project(wide) if sketch is not None and sketch.fits(wide) else None
            self._last = given, torch.linalg.vecdot(flat, flat), projection
        return self._last[1:]

    def _add_rows(
        self, call: _Call, norms: torch.Tensor, projection: torch.Tensor | None, gradient: torch.Tensor
    ) -> None:
        rows = _weighted_squares(gradient, norms)
        call.matrix.add(call.half, rows)
        if call.answer is not None and (call.alone or projection is not None):
            whole = rows.sum() if projection is None else matrix_sum(gradient, projection)
            call.matrix.add_whole(rows, whole, scale_sums(gradient, call.answer, alone=call.alone))

    def _add_columns(self, call: _Call, projection: torch.Tensor | None, gradient: torch.Tensor) -> None:
        """A weight (in, out): the sums over outputs are by input, whose scales are not told apart."""
        flat = _wide(gradient.flatten(0, -2))
        rows = _weighted_squares(call.given, torch.linalg.vecdot(flat, flat))
        call.matrix.add(call.half, rows)
        if call.answer is not None and projection is not None:
            scale = scale_sums(gradient, call.answer)[1]
            call.matrix.add_whole(rows, matrix_sum(gradient, projection), (torch.zeros_like(rows), scale))

    def _add_table(self, call: _Call, factor: float, gradient: torch.Tensor) -> None:
        """The gradient with respect to the table is `factor` times that of what the layer answers."""
        flat, tokens = _wide(gradient.flatten(0, -2)), call.given
        squares = torch.linalg.vecdot(flat, flat).double() * factor**2
        rows = torch.zeros(len(call.matrix.row_scales), dtype=squares.dtype, device=squares.device)
        rows.index_add_(0, tokens.flatten(), squares)
        call.matrix.add(call.half, rows)
        if call.answer is not None and tokens.shape == gradient.shape[:2]:
            scales = table_scale_sums(gradient, call.answer, tokens, len(rows))
            call.matrix.add_whole(rows, table_sum(gradient, tokens) * factor**2, scales)


class _Call:
    """One call of a layer, waiting for its gradient.

    `alone`: each position of the layer influences one label only, so whole sequences have nothing more than tokens.
    """

    def __init__(
        self, matrix: _Matrix, half: int, given: torch.Tensor, answer: torch.Tensor | None, *, alone: bool
    ) -> None:
        self.matrix, self.half, self.given, self.alone = matrix, half, given, alone
        self._answer, self._version = answer, None if answer is None else answer._version

    @property
    def answer(self) -> torch.Tensor | None:
        """What the layer multiplied to, where sequences are sketched and nothing has been written over it."""
        return self._answer if self._answer is not None and self._answer._version == self._version else None


def _layers(network: nn.Module, names: Mapping[int, str]) -> dict[nn.Module, str]:
    """The modules whose weight is a matrix, with the name of that parameter; `names` by its id."""
    held = ((module, module._parameters.get("weight")) for module in network.modules())
    return {module: names[id(weight)] for module, weight in held if weight is not None and weight.ndim == 2}


def head_of(network: nn.Module) -> nn.Module | None:
    """The layer that answers logits, where the network says which it is."""
    told = getattr(network, "get_output_embeddings", None)
    found = told() if callable(told) else None
    return found if isinstance(found, nn.Module) else None


def _wide(values: torch.Tensor) -> torch.Tensor:
    """In fp32, or fp64 where they already are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _weighted_squares(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ_t weights_t values_t² (columns,) in fp64; products in fp32, tiles of tokens added in fp64."""
    flat = values.flatten(0, -2)
    rows = max(1, _TILE_ELEMENTS // flat.shape[-1])
    total = torch.zeros(flat.shape[-1], dtype=torch.float64, device=flat.device)
    for tile, weight in zip(torch.split(flat, rows), torch.split(weights, rows), strict=True):
        total += weight @ _wide(tile).square()
    return total


def recognise(module: nn.Module, weight: torch.Tensor, given: Any, output: Any) -> tuple[Kind, float] | None:
    """By its type where torch's own forward is used, else by comparing the answer for the first tokens."""
    if not (isinstance(given, torch.Tensor) and isinstance(output, torch.Tensor)) or output.ndim < 2:
        return None
    if type(module).forward is nn.Linear.forward:
        return "rows", 1.0
    if type(module).forward is nn.Embedding.forward:
        return "table", 1.0
    with torch.no_grad():
        if not given.is_floating_point():
            return _table_scale(weight, given, output)
        return _orientation(weight, module._parameters.get("bias"), given, output)


def _orientation(
    weight: torch.Tensor, bias: torch.Tensor | None, given: torch.Tensor, output: torch.Tensor
) -> tuple[Kind, float] | None:
    x, answered = given.flatten(0, -2)[:_PROBED_TOKENS], output.flatten(0, -2)[:_PROBED_TOKENS]
    if x.shape[-1] == weight.shape[1] and _agree(answered, F.linear(x, weight, bias)):
        return "rows", 1.0
    if x.shape[-1] == weight.shape[0] and _agree(answered, F.linear(x, weight.T, bias)):
        return "columns", 1.0
    return None


def _table_scale(weight: torch.Tensor, tokens: torch.Tensor, output: torch.Tensor) -> tuple[Kind, float] | None:
    """The constant by which an embedding's answer differs from its table's rows."""
    chosen = tokens.flatten()[:_PROBED_TOKENS]
    rows = F.embedding(chosen, weight).double()
    answered = output.flatten(0, -2)[:_PROBED_TOKENS].double()
    if answered.shape != rows.shape or not rows.any():
        return None
    scale = float((answered * rows).sum() / rows.square().sum())
    return ("table", scale) if _agree(output.flatten(0, -2)[:_PROBED_TOKENS], (rows * scale).to(output.dtype)) else None


def _agree(answered: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to some roundings of their dtype, in units of the largest value."""
    if answered.shape != expected.shape:
        return False
    difference = (answered.double() - expected.double()).abs().amax()
    return bool(difference <= 32 * torch.finfo(answered.dtype).eps * expected.double().abs().amax())
