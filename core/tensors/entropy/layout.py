"""Version 1 of the bytes of an entropy-coded sequence: what stands where, and reading it without trusting it.

docs/entropy.md documents the bytes; a decoder written from it alone is tested against this module. A sequence is

- constant: one integer, or none at all;
- plain: integers in equally many bits each, above the least of them;
- rANS: models, segments, a directory, and streams that can be decoded each alone. Models are frequencies, or name a
  class (`classes`); segments may be left to what the sequence is a part of (`matrix`).

Every byte is under a checksum: that of a stream stands in the directory and is seeded with that of all before it.

Why these sizes: 32 lanes are one warp of a GPU, or two vectors of 512 bits with the low and the high halves of the
states; fewer are used below 2^18 numbers, where states of 3 bytes net each would be too much. A stream costs about 104
bytes net of what its states carry: the coder takes the shortest power of two that keeps them below 0.05 % of the code
(2^20 at 2 bits, 2^19 at 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from core.errors import InvalidCheckpoint
from core.tensors.entropy.classes import CLASSES, LAPLACE, NORMAL, ClassModel, class_model
from core.tensors.entropy.loops_jit import Bytes
from core.tensors.entropy.models import MOST_SYMBOLS, SymbolModel

VERSION = 1
CONSTANT, PLAIN, RANS = 0, 1, 2
MOST_LANES = 32
MOST_MODELS = 256
STREAM_BITS = (10, 24)  # least and most of log2 of a stream's symbols
MOST_NUMBERS = 1 << 48
LEAST, LARGEST = -(2**31), 2**31 - 1  # of the numbers
CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class Segment:
    """`count` numbers in a row that share a model."""

    model: int
    count: int


@dataclass(frozen=True)
class Run:
    """Part of a stream under one model: the numbers from `first` on, which take ceil(count / lanes) steps."""

    model: int
    first: int
    count: int


@dataclass(frozen=True)
class Place:
    """Where a stream's parts start in the data, and how much of each there is."""

    states: int
    escapes: int
    words: int
    stop: int
    end: int
    checksum: int
    escaped: int


@dataclass(frozen=True)
class Plan:
    """How the numbers are cut into streams."""

    segments: tuple[Segment, ...]
    lanes: int
    stream_bits: int

    @property
    def streams(self) -> int:
        steps = sum(-(-segment.count // self.lanes) for segment in self.segments)
        return -(-steps // self.steps)

    @property
    def steps(self) -> int:
        """Steps of a whole stream."""
        return (1 << self.stream_bits) // self.lanes

    def runs(self) -> Iterator[list[Run]]:
        """The runs of each stream in order; together they cover all numbers."""
        current: list[Run] = []
        left, first = self.steps, 0
        for segment in self.segments:
            beyond = first + segment.count
            while first < beyond:
                count = min(left * self.lanes, beyond - first)
                current.append(Run(segment.model, first, count))
                first, left = first + count, left - -(-count // self.lanes)
                if left == 0:
                    yield current
                    current, left = [], self.steps
        if current:
            yield current


class Reader:
    """Reads numbers from the front of untrusted bytes; InvalidCheckpoint where they end or cannot be."""

    def __init__(self, data: Bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        if self.at >= self.data.size:
            raise InvalidCheckpoint("entropy-coded data ends early")
        self.at += 1
        return int(self.data[self.at - 1])

    def varint(self, most: int, what: str) -> int:
        """A number from 0 to `most`."""
        value = 0
        for place in range(0, 64, 7):
            byte = self.byte()
            value |= (byte & 127) << place
            if byte < 128:
                break
        else:
            raise InvalidCheckpoint(f"entropy-coded data: {what} never ends")
        if value > most:
            raise InvalidCheckpoint(f"entropy-coded data: {what} is {value}, at most {most} can be")
        return value

    def signed(self, what: str) -> int:
        """A number between LEAST and LARGEST."""
        value = self.varint(2 * LARGEST + 1, what)
        return value // 2 if value % 2 == 0 else -(value + 1) // 2

    def align(self) -> None:
        self.at += -self.at % 4
        if self.at > self.data.size:
            raise InvalidCheckpoint("entropy-coded data ends early")


def varint(value: int) -> bytes:
    """The bytes of a number that is not negative."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def signed(value: int) -> bytes:
    return varint(2 * value if value >= 0 else -2 * value - 1)


def checksum(data: Bytes | bytes, seed: int = 0) -> int:
    """XXH32."""
    from core.tensors.entropy.tables_jit import xxh32

    array = np.frombuffer(bytearray(data), np.uint8) if isinstance(data, bytes) else data
    words = array[: array.size // 4 * 4].view(np.uint32)
    return int(xxh32(array, words, 0, array.size, seed)) & 0xFFFFFFFF


def sealed(data: bytes) -> Bytes:
    """The same with their checksum."""
    return np.frombuffer(bytearray(data + checksum(data).to_bytes(CHECKSUM_BYTES, "little")), np.uint8)


def head(kind: int, count: int) -> bytes:
    return bytes([VERSION, kind]) + varint(count)


def rans_head(plan: Plan, models: list[SymbolModel], is_wide: bool, *, are_known: bool = False) -> bytes:
    """All that stands before the directory; `are_known`: without the segments, which the reader knows."""
    out = head(RANS, sum(segment.count for segment in plan.segments))
    out += bytes([plan.lanes.bit_length() - 1 + 8 * plan.stream_bits]) + varint(2 * len(models) + is_wide)
    out += b"".join(model_bytes(model) for model in models)
    if len(models) > 1 and are_known:
        out += varint(0)
    elif len(models) > 1:
        out += varint(len(plan.segments))
        out += b"".join(varint(segment.model) + varint(segment.count) for segment in plan.segments)
    return out + bytes(-len(out) % 4)


def model_bytes(model: SymbolModel) -> bytes:
    """A model as it is stored."""
    if isinstance(model, ClassModel):
        return bytes([model.family, model.k - CLASSES.start])
    from core.tensors.entropy.tables_jit import write_frequencies

    bits = np.zeros(8 * model.size + 8, np.uint8)
    used = write_frequencies(model.frequencies, model.peak, model.kept, bits)
    start = varint(2 * model.size + model.has_escape) + signed(model.low)
    return start + bytes([model.precision + 16 * model.kept]) + varint(model.peak) + bits[: -(-used // 8)].tobytes()


def read_plan(reader: Reader, count: int, known: tuple[Segment, ...] = ()) -> tuple[Plan, list[SymbolModel], bool]:
    """The inverse of `rans_head` from after N on: plan, models, and whether escaped values are wide.

    `known`: the segments where the data leave them out.
    """
    shape = reader.byte()
    lanes, stream_bits = 1 << (shape & 7), shape >> 3
    if lanes > MOST_LANES or not STREAM_BITS[0] <= stream_bits <= STREAM_BITS[1]:
        raise InvalidCheckpoint(f"entropy-coded data: {lanes} lanes, streams of 2^{stream_bits}")
    number = reader.varint(2 * MOST_MODELS + 1, "number of models")
    if number < 2:
        raise InvalidCheckpoint("entropy-coded data without a model")
    models = [_read_model(reader) for _ in range(number // 2)]
    segments: tuple[Segment, ...] = (Segment(0, count),)
    if len(models) > 1:
        segments = _read_segments(reader, len(models), count) or known
        _check_segments(segments, len(models), count)
    reader.align()
    return Plan(segments, lanes, stream_bits), models, bool(number % 2)


def _read_model(reader: Reader) -> SymbolModel:
    from core.tensors.entropy.tables_jit import read_frequencies

    size = reader.varint(2 * MOST_SYMBOLS + 1, "number of symbols")
    if size in {NORMAL, LAPLACE}:
        return class_model(size, reader.byte() + CLASSES.start)
    low, widths = reader.signed("smallest symbol"), reader.byte()
    frequencies = np.zeros(size // 2, np.int64)
    peak = reader.varint(size // 2 - 1, "most frequent symbol")
    precision, kept = widths & 15, widths >> 4
    if kept == 0:
        raise InvalidCheckpoint("entropy-coded data: a model without bits")
    SymbolModel.check_precision(precision)
    at = int(read_frequencies(reader.data, reader.at, peak, precision, kept, frequencies))
    if at < 0:
        raise InvalidCheckpoint("entropy-coded data: the frequencies cannot be read")
    reader.at = at
    return SymbolModel(low, precision, frequencies, bool(size % 2))


def _read_segments(reader: Reader, models: int, count: int) -> tuple[Segment, ...]:
    number = reader.varint(reader.data.size, "number of segments")
    return tuple(
        Segment(reader.varint(models - 1, "model"), reader.varint(count, "length of a segment")) for _ in range(number)
    )


def _check_segments(segments: tuple[Segment, ...], models: int, count: int) -> None:
    is_covered = sum(segment.count for segment in segments) == count and all(segment.count for segment in segments)
    if not is_covered or not all(0 <= segment.model < models for segment in segments):
        raise InvalidCheckpoint("entropy-coded data: the segments do not cover the sequence")


def read_places(data: Bytes, at: int, plan: Plan, models: list[SymbolModel], is_wide: bool) -> list[Place]:
    """Where the streams stand, by the directory at `at`; they must fill the data exactly."""
    columns = 3 if any(model.has_escape for model in models) else 2
    streams, room = plan.streams, data.size - at
    if streams * 4 * (columns + plan.lanes) > room:
        raise InvalidCheckpoint(f"entropy-coded data: {room} bytes for {streams} streams")
    rows = data[at : at + 4 * columns * streams].view("<u4").reshape(streams, columns).tolist()
    places, at = [], at + 4 * columns * streams
    for words, checksum, *more in rows:
        escaped = more[0] if more else 0
        escapes = at + 4 * plan.lanes
        start = escapes + escaped * (4 if is_wide else 2)
        stop = start + 2 * words
        places.append(Place(at, escapes, start, stop, stop + -stop % 4, checksum, escaped))
        at = places[-1].end
    if at != data.size:
        raise InvalidCheckpoint(f"entropy-coded data: {data.size} bytes where the directory needs {at}")
    return places
