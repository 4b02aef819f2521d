"""Reading of entropy-coded sequences: whole, or any range of numbers, on as many threads as asked.

Every byte is under a checksum, every read is bounded, and what memory is taken follows from the number of integers that
the caller expects, not from what the data say. Data that cannot be decoded raise InvalidCheckpoint, and what was
written to the output before is no result. Numbers decoded are those that were encoded, or there is an error.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from core.errors import InvalidCheckpoint
from core.tensors.entropy import layout
from core.tensors.entropy.layout import Place, Plan, Reader, Run, Segment
from core.tensors.entropy.loops_jit import Bytes, Numbers, Table32
from core.tensors.entropy.machine import has_wide_vectors
from core.tensors.entropy.models import SymbolModel
from core.tensors.entropy.plain import PlainNumbers

DType = type[np.integer[Any]]
_END = 1 << 16  # of every state
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def decode(data: Bytes | bytes, count: int, dtype: DType = np.int32, threads: int = 1) -> Numbers:
    """The `count` integers of these bytes; InvalidCheckpoint where it is not exactly these, or they do not fit."""
    out = np.empty(count, dtype)
    CodedSequence.parse(data, count).decode(out, threads=threads)
    return out


@dataclass(eq=False)
class Stream:
    """A stream that is being decoded."""

    place: Place
    runs: list[Run]
    states: Table32
    at: int

    @property
    def first(self) -> int:
        return self.runs[0].first


class CodedSequence:
    """A sequence whose bytes have been looked through, but whose numbers have not been decoded yet."""

    def __init__(self, data: Bytes, count: int, reader: Reader, known: tuple[Segment, ...] = ()) -> None:
        self.data, self.count = data, count
        kind = reader.byte()
        stored = reader.varint(layout.MOST_NUMBERS, "number of integers")
        if stored != count:
            raise InvalidCheckpoint(f"{stored} integers where {count} are expected")
        self.constant: int | None = None
        self.plain: PlainNumbers | None = None
        self.plan, self.models, self.places = Plan((), 1, layout.STREAM_BITS[0]), list[SymbolModel](), list[Place]()
        if kind == layout.CONSTANT:
            self.constant = reader.signed("value")
            self._check_seal(reader.at)
        elif kind == layout.PLAIN:
            self.plain = PlainNumbers(reader, count)
            self._check_seal(data.size - layout.CHECKSUM_BYTES)
        elif kind == layout.RANS and count:
            self.plan, self.models, is_wide = layout.read_plan(reader, count, known)
            self.escape_dtype, self.seed = np.dtype("<i4" if is_wide else "<i2"), layout.checksum(data[: reader.at])
            self.places = layout.read_places(data, reader.at, self.plan, self.models, is_wide)
            self.runs = list(self.plan.runs())
            self.firsts = [runs[0].first for runs in self.runs]
        else:
            raise InvalidCheckpoint(f"entropy-coded data of kind {kind}", hint="written by a later version?")

    @classmethod
    def parse(cls, data: Bytes | bytes, count: int, known: tuple[Segment, ...] = ()) -> CodedSequence:
        """Looks through bytes that should hold `count` integers; decodes nothing yet, but sets all limits.

        `known`: the segments where the data leave them out.
        """
        array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        if not array.flags.writeable or not array.flags.c_contiguous or array.ctypes.data % 4:
            array = array.copy()  # one kind of array, so that loops are compiled once
        reader = Reader(array)
        if (version := reader.byte()) != layout.VERSION:
            raise InvalidCheckpoint(f"entropy-coded data of version {version}", hint="written by a later version?")
        return cls(array, count, reader, known)

    def decode(self, out: Numbers, start: int = 0, threads: int = 1) -> None:
        """Fills `out` (flat, contiguous) with the numbers from `start` on.

        A stream that is wanted in part is decoded whole. InvalidCheckpoint where the data are damaged, or numbers do
        not fit the dtype of `out`.
        """
        if not 0 <= start <= start + out.size <= self.count:
            raise ValueError(f"numbers {start} to {start + out.size} of {self.count}")
        if self.constant is not None:
            self._fill(out, self.constant)
        elif self.plain is not None:
            self.plain.read_into(out, start)
        elif out.size:
            self.check_fit(out)
            first, last = bisect_right(self.firsts, start) - 1, bisect_right(self.firsts, start + out.size - 1)
            works = [self._work(part, out, start) for part in self._batches(first, last)]
            if threads > 1 and len(works) > 1:
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(lambda work: work(), works))
            else:
                for work in works:
                    work()

    def limits(self) -> tuple[int, int]:
        """The least and the largest number that models, escaped values or another kind's bytes can give."""
        if self.constant is not None:
            return self.constant, self.constant
        if self.plain is not None:
            return self.plain.low, self.plain.low + (1 << self.plain.width) - 1
        ends = [end for model in self.models for end in (model.low, model.high)]
        for place in self.places:
            values = self.data[place.escapes : place.words].view(self.escape_dtype)
            ends += [int(values.min()), int(values.max())] if values.size else []
        return min(ends), max(ends)

    def runs_of(self, most: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of runs of whole streams, of about `most` numbers, that together are the sequence."""
        if not self.places:
            yield from ((start, min(start + most, self.count)) for start in range(0, self.count, most))
            return
        streams = max(1, most >> self.plan.stream_bits)
        for first in range(0, len(self.firsts), streams):
            beyond = first + streams
            yield self.firsts[first], self.firsts[beyond] if beyond < len(self.firsts) else self.count

    def streams_between(self, start: int, stop: int) -> range:
        """The streams that hold the numbers `start` to `stop` - 1."""
        return range(bisect_right(self.firsts, start) - 1, bisect_left(self.firsts, stop))

    def _check_seal(self, stop: int) -> None:
        if stop + layout.CHECKSUM_BYTES != self.data.size:
            raise InvalidCheckpoint(f"{self.data.size} bytes of which {stop + layout.CHECKSUM_BYTES} are used")
        if layout.checksum(self.data[:stop]) != int.from_bytes(self.data[stop:].tobytes(), "little"):
            raise InvalidCheckpoint("entropy-coded data are damaged: the checksum differs")

    def _fill(self, out: Numbers, value: int) -> None:
        limits = np.iinfo(out.dtype)
        if not limits.min <= value <= limits.max:
            raise InvalidCheckpoint(f"{value} does not fit {out.dtype}")
        out[:] = value

    def check_fit(self, out: Numbers) -> None:
        """InvalidCheckpoint where a model has numbers that the dtype of `out` cannot hold."""
        limits = np.iinfo(out.dtype)
        for model in self.models:
            if model.low < limits.min or model.high > limits.max or model.size > 1 << limits.bits:
                raise InvalidCheckpoint(f"numbers from {model.low} to {model.high} do not fit {out.dtype}")

    def _batches(self, first: int, last: int) -> list[range]:
        """Streams first to last - 1, in fours where the loops can take them together."""
        batches, at = [], first
        while at < last:
            whole = [self.runs[i][0] for i in range(at, min(at + 4, last)) if len(self.runs[i]) == 1]
            alike = len(whole) == 4 and len({(run.model, run.count) for run in whole}) == 1
            batches.append(range(at, at + 4) if alike and self._has_vectors else range(at, at + 1))
            at = batches[-1].stop
        return batches

    @cached_property
    def _has_vectors(self) -> bool:
        return self.plan.lanes == layout.MOST_LANES and has_wide_vectors()

    @cached_property
    def _tail(self) -> Bytes:
        """The end of the data with zeros behind it."""
        from core.tensors.entropy.avx512_jit import MARGIN

        return np.concatenate([self.data[-MARGIN:], np.zeros(MARGIN, np.uint8)])

    def _work(self, numbers: range, out: Numbers, start: int) -> Callable[[], None]:
        """The decoding of some streams into `out`, whose first number is `start`."""
        first = self.firsts[numbers.start]
        beyond = self.firsts[numbers.stop] if numbers.stop < len(self.firsts) else self.count

        def work() -> None:
            if start <= first and beyond <= start + out.size:
                self._decode(numbers, out[first - start : beyond - start])
            else:
                decoded = np.empty(beyond - first, out.dtype)
                self._decode(numbers, decoded)
                low, high = max(first, start), min(beyond, start + out.size)
                out[low - start : high - start] = decoded[low - first : high - first]

        return work

    def _decode(self, numbers: range, out: Numbers) -> None:
        """Streams that follow each other, into all of `out`."""
        streams = [self.opened(number) for number in numbers]
        first = streams[0].first
        marks = [0] * len(streams)
        for part in zip(*(stream.runs for stream in streams), strict=True):
            self._decode_runs(streams, part, out, first)
            for i, run in enumerate(part):
                marks[i] += self._escapes(streams[i], run, marks[i], out[run.first - first :][: run.count])
        for stream, found in zip(streams, marks, strict=True):
            if stream.at != stream.place.stop or found != stream.place.escaped or (stream.states != _END).any():
                raise InvalidCheckpoint("entropy-coded data are damaged: a stream does not end where it should")

    def opened(self, number: int) -> Stream:
        """A stream at its start, its checksum and states verified."""
        place = self.places[number]
        if layout.checksum(self.data[place.states : place.end], self.seed) != place.checksum:
            raise InvalidCheckpoint(f"entropy-coded data are damaged: the checksum of stream {number} differs")
        states = self.data[place.states : place.escapes].view("<u4").astype(np.uint32)
        if states.min() < _END:
            raise InvalidCheckpoint(f"entropy-coded data: a state of stream {number} is too small")
        return Stream(place, self.runs[number], states, place.words)

    def _decode_runs(self, streams: Sequence[Stream], runs: Sequence[Run], out: Numbers, first: int) -> None:
        """One run of each stream, all alike; `first` is the number that out[0] is."""
        model, count = self.models[runs[0].model], runs[0].count
        dtype, low = model.tables.dtype, runs[0].first - first
        beyond = runs[-1].first + runs[-1].count - first
        target = out[low:beyond]
        if out.dtype.itemsize == dtype.itemsize:
            self._steps(streams, model, target.view(dtype), count, model.low)
        else:
            symbols = np.empty(target.size, dtype)
            self._steps(streams, model, symbols, count, 0)
            np.copyto(target, symbols, casting="unsafe")
            target += np.array(model.low).astype(out.dtype)

    def _steps(self, streams: Sequence[Stream], model: SymbolModel, out: Numbers, count: int, added: int) -> None:
        """`count` numbers of each stream one after the other, by vectors as far as these go."""
        from core.tensors.entropy.loops_jit import decode_steps

        done = self._vector_steps(streams, model, out, count, added) if self._has_vectors else 0
        tables, added = model.tables, added & ((1 << 8 * out.itemsize) - 1)
        for i, stream in enumerate(streams):
            look = (model.precision, tables.entries, tables.frequencies, added, out, i * count + done, count - done)
            stream.at = int(decode_steps(self.data, stream.at, stream.states, *look))
            if stream.at < 0:
                raise InvalidCheckpoint("entropy-coded data are damaged: a stream ends early")

    def _vector_steps(self, streams: Sequence[Stream], model: SymbolModel, out: Numbers, count: int, added: int) -> int:
        """As many whole steps as there are, of one or four streams; how many numbers of each they gave."""
        from core.tensors.entropy import avx512_jit

        tables, steps = model.tables, count // avx512_jit.LANES
        halves = np.stack([np.stack([s.states & 0xFFFF, s.states >> np.uint32(16)]) for s in streams]).astype(np.uint16)
        places = np.array([(s.at, s.place.stop, i * count) for i, s in enumerate(streams)]).T.copy()
        look = (model.precision, tables.alias, tables.entries, tables.frequencies)
        if avx512_jit.decode(tables.buckets, self.data, self._tail, places, halves, *look, added, out, steps) >= 0:
            raise InvalidCheckpoint("entropy-coded data are damaged: a stream ends early")
        for stream, at, (low, high) in zip(streams, places[0].tolist(), halves.astype(np.uint32), strict=True):
            stream.at, stream.states = at, low | (high << np.uint32(16))
        return steps * avx512_jit.LANES

    def _escapes(self, stream: Stream, run: Run, done: int, out: Numbers) -> int:
        """Puts the escaped values of a run in their places; how many there are."""
        model, place = self.models[run.model], stream.place
        if not model.has_escape:
            return 0
        from core.tensors.entropy.tables_jit import put_escapes

        limits, unsigned = np.iinfo(out.dtype), out.view(_UNSIGNED[out.dtype.itemsize])
        values = self.data[place.escapes : place.words].view(self.escape_dtype)[done:].astype(np.int64)
        if values.size and (values.min() < limits.min or values.max() > limits.max):
            raise InvalidCheckpoint(f"escaped numbers that do not fit {out.dtype}")
        mark = (model.low + model.size - 1) % (1 << limits.bits)
        found = int(put_escapes(unsigned, mark, values))
        if found < 0:
            raise InvalidCheckpoint("entropy-coded data are damaged: an escaped number is missing")
        return found
