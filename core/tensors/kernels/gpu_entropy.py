"""Entropy-coded sequences decoded on a GPU: their numbers, or at once the values that these stand for.

Checksums and first states are checked here, before anything is launched; the kernel bounds every read and says of each
stream whether it ended as it should, so the outcome is that of `core.tensors.entropy.decoder`: the numbers that were
encoded, or InvalidCheckpoint. Each function waits for that answer. Where no kernel runs (no CUDA device, kinds without
streams, `_values_refusal`) the CPU decodes and torch does the rest, with the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import InvalidCheckpoint
from core.tensors.entropy import layout
from core.tensors.entropy.decoder import CodedSequence, DType
from core.tensors.entropy.models import SymbolModel
from core.tensors.kernels.gpu import device_refusal, on_device
from core.tensors.kernels.gpu_launch import Arguments, Constants, Launch

NUMBERS: dict[torch.dtype, DType] = {torch.int8: np.int8, torch.int16: np.int16, torch.int32: np.int32}
VALUES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_MARGIN = 4  # bytes behind the last stream's words, one of which may be read
_MOST = 1 << 30  # rows, columns, blocks: a step beyond still fits 31 bits
_CHUNK = 1 << 22  # numbers that torch works on at once
_EARLY = "entropy-coded data are damaged: a stream ends early"
_END = "entropy-coded data are damaged: a stream does not end where it should"
_MISSING = "entropy-coded data are damaged: an escaped number is missing"


class StreamsLaunch(Launch):
    """A launch of `gpu_entropy_kernel`."""

    def run(self) -> None:
        from core.tensors.kernels import gpu_entropy_kernel

        kernel = getattr(gpu_entropy_kernel, self.kernel)
        kernel[(self.programs,)](*self.arguments, **self.constants, num_warps=self.warps)


def decode_codes(
    sequence: CodedSequence, device: torch.device, streams: range, dtype: torch.dtype = torch.int16
) -> torch.Tensor:
    """The numbers of consecutive streams, flat, on the device; all numbers of a sequence without streams.

    `dtype`: int8, int16 or int32. InvalidCheckpoint where the data are damaged, or numbers do not fit it.
    """
    start, stop = _extent(sequence, streams)
    kind = np.dtype(NUMBERS[dtype])
    if not sequence.places or start == stop or device_refusal(device):
        decoded = np.empty(stop - start, kind)
        sequence.decode(decoded, start)
        return torch.from_numpy(decoded).to(device)
    sequence.check_fit(np.empty(0, kind))
    out = torch.empty(stop - start, dtype=dtype, device=device)
    _run(sequence, streams, start, number_records(sequence.models, out), Target.numbers(out))
    _put_escapes(sequence, streams, out, start)
    return out


def dequantise(
    sequence: CodedSequence,
    streams: range,
    out: torch.Tensor,
    values: torch.Tensor,
    low: int,
    factors: torch.Tensor,
    columns: int,
    width: int,
    order: torch.Tensor | None = None,
    axis: int = 0,
) -> None:
    """The values of consecutive streams to their places in `out`: values[code - low] * factor, rounded once.

    `out`: all of the tensor, flat, fp32, bf16 or fp16, rows of `columns` elements. `values`: fp32, flat; codes beyond
    either end take what stands there. `factors`: fp32, one for each block of `width` elements of a row, or one for all.
    With `order` (int32, all rows or columns) line l of the coded order is row (`axis` 0) or column order[l]. All are on
    the device of `out`. InvalidCheckpoint where the data are damaged; ValueError where sizes do not agree.
    """
    target = Target(out, factors.reshape(-1), columns, min(width, columns), order, axis)
    target.check(sequence.count)
    start, stop = _extent(sequence, streams)
    if start == stop:
        return
    if not sequence.places or device_refusal(out.device) or target.refusal(sequence):
        codes = decode_codes(sequence, out.device, streams, torch.int32)
        for at in range(0, codes.numel(), _CHUNK):
            target.put(codes[at : at + _CHUNK], start + at, values, low)
        return
    sequence.check_fit(np.empty(0, np.int32))
    _run(sequence, streams, 0, value_records(sequence.models, values, low), target)


def launch_of(
    sequence: CodedSequence, streams: range, origin: int, records: torch.Tensor, target: Target, *, is_inline: bool
) -> tuple[StreamsLaunch, torch.Tensor]:
    """What decodes the streams, number `origin` to the first place of the target, and what their ends are told in.

    `is_inline`: with the instructions of NVIDIA's devices, which is taken up only for 32 lanes.
    """
    device, lanes = target.out.device, sequence.plan.lanes
    data, base = _uploaded(sequence, streams, device)
    rows, runs = _tables(sequence, streams, origin, base)
    ended = torch.empty(len(streams), dtype=torch.int32, device=device)
    tables = (torch.from_numpy(rows).to(device), torch.from_numpy(runs).to(device), records)
    arguments = (data.view(torch.int32), data.view(torch.uint16), *tables, target.pointer, ended, *target.arguments)
    constants = target.constants | {"LANES": lanes, "INLINE": is_inline and lanes == layout.MOST_LANES}
    return StreamsLaunch("streams_kernel", arguments, constants, len(streams), 1), ended


def _extent(sequence: CodedSequence, streams: range) -> tuple[int, int]:
    """First number of the streams and the one after their last."""
    if not sequence.places:
        return 0, sequence.count
    if streams.step != 1 or not 0 <= streams.start <= streams.stop <= len(sequence.places):
        raise ValueError(f"streams {streams} of {len(sequence.places)}")
    ends = [*sequence.firsts, sequence.count]
    return ends[streams.start], ends[streams.stop]


def _run(sequence: CodedSequence, streams: range, origin: int, records: torch.Tensor, target: Target) -> None:
    """InvalidCheckpoint where a stream is damaged."""
    for number in streams:
        sequence.opened(number)
        steps = sum(-(-run.count // sequence.plan.lanes) for run in sequence.runs[number])
        if sequence.places[number].stop - sequence.places[number].words > 2 * steps * sequence.plan.lanes:
            raise InvalidCheckpoint(_END)
    launch, ended = launch_of(
        sequence, streams, origin, records, target, is_inline=target.out.is_cuda and torch.version.cuda is not None
    )
    with on_device(target.out.device):
        launch.run()
    if wrong := next((end for end in ended.tolist() if end), 0):
        raise InvalidCheckpoint(_EARLY if wrong == 1 else _END)


def _uploaded(sequence: CodedSequence, streams: range, device: torch.device) -> tuple[torch.Tensor, int]:
    """The bytes of the streams on the device, and which byte of the data is the first."""
    start, stop = sequence.places[streams.start].states, sequence.places[streams.stop - 1].end
    data = torch.zeros(stop - start + _MARGIN, dtype=torch.uint8, device=device)
    data[: stop - start].copy_(torch.from_numpy(sequence.data[start:stop]))
    return data, start


def _tables(
    sequence: CodedSequence, streams: range, origin: int, base: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`streams` and `runs` of the kernel."""
    firsts = np.cumsum([0, *(1 << model.precision for model in sequence.models)]).tolist()
    rows: list[tuple[int, ...]] = []
    runs: list[tuple[int, ...]] = []
    for number in streams:
        place, before = sequence.places[number], len(runs)
        runs += [
            (run.first - origin, run.count, firsts[run.model], sequence.models[run.model].precision)
            for run in sequence.runs[number]
        ]
        words = (place.stop - place.words) // 2
        rows.append(((place.states - base) // 4, (place.words - base) // 2, words, before, len(runs)))
    return np.array(rows, np.int64), np.array(runs, np.int64)


def _records(models: list[SymbolModel], found: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """int64 by slot of each model in turn; `found`: int32 by symbol."""
    parts = []
    for model, by_symbol in zip(models, found, strict=True):
        symbols = model.tables.entries >> np.uint32(16)
        low = model.tables.frequencies[symbols] | (model.tables.entries << np.uint32(16))
        slots = torch.from_numpy(symbols.astype(np.int64)).to(device)
        parts.append(torch.stack([torch.from_numpy(low.view(np.int32)).to(device), by_symbol[slots]], dim=1))
    return torch.cat(parts).view(torch.int64).reshape(-1)


def number_records(models: list[SymbolModel], out: torch.Tensor) -> torch.Tensor:
    numbers = [torch.from_numpy((model.low + np.arange(model.size)).astype(np.int32)) for model in models]
    wide = _records(models, [part.to(out.device) for part in numbers], out.device)
    if out.dtype is torch.int32:
        return wide
    ranks = (wide << 32) & -(1 << 48)
    return (wide & 0xFFFF) | (wide & (0xFFFF << 32)) | ranks


def value_records(models: list[SymbolModel], values: torch.Tensor, low: int) -> torch.Tensor:
    patterns = values.contiguous().view(torch.int32)
    places = [torch.from_numpy(np.clip(m.low - low + np.arange(m.size), 0, values.numel() - 1)) for m in models]
    return _records(models, [patterns[part.to(values.device)] for part in places], values.device)


def _put_escapes(sequence: CodedSequence, streams: range, out: torch.Tensor, start: int) -> None:
    """Escaped values to where their mark stands in `out`, whose first number is `start`."""
    if not any(model.has_escape for model in sequence.models):
        return
    limits, marks = np.iinfo(NUMBERS[out.dtype]), torch.zeros_like(out, dtype=torch.bool)
    runs = [run for number in streams for run in sequence.runs[number]]
    for index, part in groupby(runs, key=lambda run: run.model):
        alike, model = list(part), sequence.models[index]
        if model.has_escape:
            here = slice(alike[0].first - start, alike[-1].first + alike[-1].count - start)
            mark = (model.low + model.size - 1 - limits.min) % (1 << limits.bits) + limits.min
            marks[here] = out[here] == mark
    places = marks.nonzero().reshape(-1)
    values = _escaped(sequence, streams, places, start)
    if values.size and (values.min() < limits.min or values.max() > limits.max):
        raise InvalidCheckpoint(f"escaped numbers that do not fit {limits.dtype}")
    out[places] = torch.from_numpy(values.astype(limits.dtype)).to(out.device)


def _escaped(sequence: CodedSequence, streams: range, marks: torch.Tensor, start: int) -> NDArray[np.int64]:
    """The escaped values of the streams, as many of each as it has marks."""
    ends = torch.tensor([*sequence.firsts, sequence.count])[streams.start : streams.stop + 1] - start
    places = sequence.places[streams.start : streams.stop]
    stored = np.array([place.escaped for place in places])
    found = torch.searchsorted(marks, ends.to(marks.device)).diff().cpu().numpy()
    if (found != stored).any():
        first = (found != stored).argmax()
        raise InvalidCheckpoint(_MISSING if found[first] > stored[first] else _END)
    parts = [sequence.data[place.escapes : place.words].view(sequence.escape_dtype) for place in places]
    return np.concatenate(parts).astype(np.int64)


@dataclass(frozen=True)
class Target:
    """Where numbers or values go; parameters as of `dequantise`, `width` at most `columns`."""

    out: torch.Tensor
    factors: torch.Tensor
    columns: int = 1
    width: int = 1
    order: torch.Tensor | None = None
    axis: int = 0

    @classmethod
    def numbers(cls, out: torch.Tensor) -> Target:
        return cls(out, torch.ones(1, device=out.device))

    def check(self, count: int) -> None:
        """ValueError where sizes do not agree with `count` numbers."""
        lines = self.columns if self.axis else count // max(self.columns, 1)
        if self.out.shape != (count,) or self.columns < 1 or self.width < 1 or count % self.columns:
            raise ValueError(f"{tuple(self.out.shape)} in rows of {self.columns} for {count} numbers")
        if self.factors.numel() not in {1, count // self.columns * self._per_row}:
            raise ValueError(f"{self.factors.numel()} factors for blocks of {self.width} in rows of {self.columns}")
        if self.order is not None and self.order.shape != (lines,):
            raise ValueError(f"an order of {tuple(self.order.shape)} for {lines} lines")

    def refusal(self, sequence: CodedSequence) -> str | None:
        """Why the kernel does not write values here; None where it does."""
        if any(model.has_escape for model in sequence.models):
            return "escaped numbers have no record"
        if max(self.columns, self.out.numel() // self.columns, self.factors.numel()) > _MOST:
            return "rows, columns or blocks are too many to be counted in 32 bits"
        return "lines are shorter than a step" if self._walks and self._length < sequence.plan.lanes else None

    def put(self, codes: torch.Tensor, start: int, values: torch.Tensor, low: int) -> None:
        """What the kernel does, in torch: the values of `codes`, numbers from `start` on, to their places."""
        at = torch.arange(start, start + codes.numel(), device=codes.device)
        if self.order is not None:
            rows = self.out.numel() // self.columns
            length = rows if self.axis else self.columns
            line, place = self.order.long()[at // length], at % length
            at = place * self.columns + line if self.axis else line * self.columns + place
        block = at // self.columns * self._per_row + at % self.columns // self.width
        factor = self.factors[block] if self.factors.numel() > 1 else self.factors
        found = values[(codes.long() - low).clamp(0, values.numel() - 1)] * factor
        self.out[at] = found.to(self.out.dtype)

    @property
    def pointer(self) -> torch.Tensor:
        """bf16 as patterns: Triton's interpreter does not round to it."""
        return self.out.view(torch.int16) if self.out.dtype is torch.bfloat16 else self.out

    @property
    def arguments(self) -> Arguments:
        """From `factors` on."""
        order = torch.zeros(1, dtype=torch.int32, device=self.out.device) if self.order is None else self.order
        span = self.width.bit_length() - 1 if self._blocks in {"flat", "shift"} else self.width
        return self.factors, order, self.columns, self._length, span, self._per_row

    @property
    def constants(self) -> Constants:
        kind = VALUES.get(self.out.dtype, "wide" if self.out.dtype is torch.int32 else "narrow")
        axis = -1 if self.order is None else self.axis
        return {"OUT": kind, "BLOCKS": self._blocks, "AXIS": axis, "WALKS": self._walks}

    @property
    def _per_row(self) -> int:
        return -(-self.columns // self.width)

    @property
    def _length(self) -> int:
        """Numbers of a line, after which the kernel's count of places starts anew."""
        if self.order is None:
            return self.width if self._blocks == "row" else self.columns
        return self.out.numel() // self.columns if self.axis else self.columns

    @property
    def _walks(self) -> bool:
        return self.order is not None or self._blocks not in {"none", "one", "flat"}

    @property
    def _blocks(self) -> str:
        is_power, fills = self.width & (self.width - 1) == 0, self.columns % self.width == 0
        if self.out.dtype not in VALUES:
            return "none"
        if self.factors.numel() == 1:
            return "one"
        if self.order is None and fills:
            return "flat" if is_power else "row"
        if self.width == self.columns:
            return "row"
        return "shift" if is_power else "divide"
