"""Encoding of integers at their entropy; `layout` documents the bytes, `decoder` reads them.

Lossless for any integers of 32 bits. The same bytes whatever the machine and whichever loops do the work, given the
same models; models chosen here depend on logarithms and could differ in a frequency where two are equally good.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.errors import InvalidFormat
from core.tensors.entropy import layout
from core.tensors.entropy.layout import Plan, Run, Segment
from core.tensors.entropy.loops_jit import Bytes, Longs, Numbers, Table32
from core.tensors.entropy.machine import has_wide_vectors
from core.tensors.entropy.models import SymbolModel
from core.tensors.entropy.plain import pack_plain

_START = 1 << 16  # of every state
_NET_BITS = 8 * 104  # of a stream, less what its states carry
_SHARE = 5e-4  # of the code that they may take
_USUAL_STREAM_BITS = (16, 21)
_FULL_LANES = 1 << 18  # numbers from which on there are 32 lanes
_NUMBERS_PER_LANE = 1 << 15  # below that
_LEAST_VECTOR_PRECISION = 12
_USUAL_ESCAPES = 1 << 12  # of a run


def encode(codes: Numbers, model: SymbolModel | None = None) -> Bytes:
    """Bytes of integers (any shape, in memory order), by a model of their own unless one is given.

    InvalidFormat where a number has neither a symbol nor an escape, or more than 32 bits.
    """
    from core.tensors.entropy.choice import shortest_model
    from core.tensors.entropy.windows import counted

    flat = _flat(codes)
    if flat.size == 0 or (model is None and flat.min() == flat.max()):
        return _constant(flat)
    chosen = model or shortest_model(*counted(flat))
    coded = encode_segments(flat, [chosen], [Segment(0, flat.size)])
    plain = pack_plain(flat, coded.size) if model is None else None
    return coded if plain is None else plain


def encode_segments(
    codes: Numbers,
    models: Sequence[SymbolModel],
    segments: Sequence[Segment],
    lanes: int | None = None,
    stream_bits: int | None = None,
    *,
    are_known: bool = False,
) -> Bytes:
    """Bytes of integers of which each segment has a model of its own; `are_known`: the reader knows the segments.

    `lanes` (a power of two up to 32) and log2 of the numbers of a stream (10 to 24) are chosen where not given.
    InvalidFormat where the segments do not cover the numbers, or a number has neither a symbol nor an escape.
    """
    flat, models = _flat(codes), list(models)
    low, high = layout.STREAM_BITS
    if lanes not in {None, 1, 2, 4, 8, 16, 32} or not (stream_bits is None or low <= stream_bits <= high):
        raise InvalidFormat(f"{lanes} lanes, streams of 2^{stream_bits} numbers")
    if len(models) > layout.MOST_MODELS:
        raise InvalidFormat(f"{len(models)} models", hint=f"at most {layout.MOST_MODELS}")
    if sum(segment.count for segment in segments) != flat.size or min((s.count for s in segments), default=0) < 1:
        raise InvalidFormat(f"segments that do not cover {flat.size} numbers")
    chosen = lanes or (layout.MOST_LANES if flat.size >= _FULL_LANES else _few_lanes(flat.size))
    plan = Plan(tuple(segments), chosen, stream_bits or _stream_bits(_bits_per_number(flat, models, segments)))
    return _Writer(flat, plan, models).all_bytes(are_known)


def _flat(codes: Numbers) -> Numbers:
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.dtype.kind not in "iu":
        raise InvalidFormat(f"entropy coding of {flat.dtype}", hint="integers")
    if flat.dtype.itemsize >= 4 and flat.size and not layout.LEAST <= flat.min() <= flat.max() <= layout.LARGEST:
        raise InvalidFormat("entropy coding of numbers with more than 32 bits")
    return flat.astype(np.int32) if flat.dtype.itemsize == 8 else flat


def _constant(flat: Numbers) -> Bytes:
    value = int(flat[0]) if flat.size else 0
    return layout.sealed(layout.head(layout.CONSTANT, flat.size) + layout.signed(value))


def _few_lanes(count: int) -> int:
    return 1 << max(0, (count // _NUMBERS_PER_LANE).bit_length() - 1)


def _bits_per_number(flat: Numbers, models: Sequence[SymbolModel], segments: Sequence[Segment]) -> float:
    """By the models, each of which is taken to be right about its numbers."""
    entropies = [float(np.dot(m.frequencies[m.frequencies > 0], m.costs[m.frequencies > 0])) for m in models]
    shares = [s.count / flat.size * entropies[s.model] / (1 << models[s.model].precision) for s in segments]
    return sum(shares)


def _stream_bits(bits: float) -> int:
    """The shortest streams whose states and directory are within their share."""
    low, high = _USUAL_STREAM_BITS
    wanted = _NET_BITS / _SHARE / max(bits, 1e-9)
    return next((width for width in range(low, high) if 1 << width >= wanted), high)


class _Writer:
    """The streams of one sequence."""

    def __init__(self, flat: Numbers, plan: Plan, models: list[SymbolModel]) -> None:
        self.flat, self.plan, self.models = flat, plan, models
        self.vectors = plan.lanes == layout.MOST_LANES and has_wide_vectors()
        self.escaped: list[Longs] = []
        self.has_escape = any(model.has_escape for model in models)
        most = min(1 << plan.stream_bits, flat.size + plan.lanes * len(plan.segments))
        self.words = np.empty(2 * most, np.uint8)

    def all_bytes(self, are_known: bool) -> Bytes:
        coded = [self._stream(runs) for runs in self.plan.runs()]
        is_wide = any(part.size and np.abs(part).max() >= 1 << 15 for part in self.escaped)
        start = layout.rans_head(self.plan, self.models, is_wide, are_known=are_known)
        bodies, rows, seed = [], [], layout.checksum(start)
        for (states, words), escaped in zip(coded, self.escaped, strict=True):
            values = escaped.astype("<i4" if is_wide else "<i2").tobytes()
            body = states.astype("<u4").tobytes() + values + words.tobytes()
            bodies.append(body + bytes(-len(body) % 4))
            row = (words.size // 2, layout.checksum(bodies[-1], seed), escaped.size)
            rows.append(row[: 3 if self.has_escape else 2])
        return np.frombuffer(bytearray().join([start, np.array(rows, "<u4").tobytes(), *bodies]), np.uint8)

    def _stream(self, runs: list[Run]) -> tuple[Table32, Bytes]:
        """Final states and words; what escapes is put aside."""
        parts = [self._indices(run) for run in runs]
        self.escaped.append(np.concatenate([escaped for _, escaped in parts]))
        states, at = np.full(self.plan.lanes, _START, np.uint32), self.words.size
        for run, (indices, _) in zip(reversed(runs), reversed(parts), strict=True):
            at = self._steps(self.models[run.model], indices, states, at)
        return states, self.words[at:].copy()

    def _indices(self, run: Run) -> tuple[Numbers, Longs]:
        """Symbols of a run in whole steps, and the numbers that have none."""
        from core.tensors.entropy.tables_jit import to_indices

        model, codes = self.models[run.model], self.flat[run.first : run.first + run.count]
        lanes = self.plan.lanes
        indices = np.full(-(-run.count // lanes) * lanes, model.peak, model.tables.dtype)
        frequencies, room = model.tables.frequencies, _USUAL_ESCAPES
        while True:
            escaped = np.empty(room, np.int64)
            given = (codes, model.low, frequencies, model.values, model.size - 1, indices, escaped)
            found = int(to_indices(*given))
            if found and not model.has_escape:
                raise InvalidFormat(f"{found} numbers have no symbol", hint="a model with an escape takes any")
            if found <= room:
                return indices, escaped[:found]
            room = found

    def _steps(self, model: SymbolModel, indices: Numbers, states: Table32, at: int) -> int:
        """Encodes the indices, last to first, before words[at]; the new end."""
        tables, lanes = model.tables, states.size
        steps, precision = indices.size // lanes, model.precision
        if not self.vectors or precision < _LEAST_VECTOR_PRECISION:
            from core.tensors.entropy.loops_jit import encode_steps

            look = (tables.frequencies, tables.bases, tables.slots)
            return int(encode_steps(indices, steps, states, precision, *look, self.words, at))
        from core.tensors.entropy.avx512_jit import encode as encode_vectors

        halves = states.view(np.uint16).reshape(1, lanes, 2).transpose(0, 2, 1).copy()
        look_up = (tables.coding, tables.slots, tables.records, tables.reciprocals)
        end = int(encode_vectors(tables.buckets, indices, steps, halves, precision, *look_up, self.words, at))
        states[:] = halves[0, 0] + (halves[0, 1].astype(np.uint32) << np.uint32(16))
        return end
