"""Matrices whose rows or columns have scales of their own: each group of them is coded by the model that suits it.

    u8 version = 1, u8 axis (0 rows, 1 columns), varint width: rows or columns of a group, in order
    varint bytes, then a sequence (`layout`): for each group the index of its model
    zeros up to a multiple of 4, and u32 XXH32 of all of that
    a sequence (`layout`): the numbers, one segment for each model, in the order of the models

Under a model stand its groups in ascending order, and in a group its rows one after the other (axis 1: its columns).
One histogram for all loses 0.05 bit a number where scales vary by a factor of e^0.2, 0.3 at e^0.6; classes of standard
deviations 2^(k/8) lose less than 0.001 (entropy of discretised Normal variables, exact). Classes only sort the groups:
the model of a class is then made of the numbers in it, or of the family where that is shorter.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidCheckpoint
from core.tensors.entropy import layout
from core.tensors.entropy.coder import encode, encode_segments
from core.tensors.entropy.decoder import CodedSequence, DType
from core.tensors.entropy.decoder import decode as decode_sequence
from core.tensors.entropy.families import FAMILIES, parametric_model, probabilities
from core.tensors.entropy.layout import Reader, Segment
from core.tensors.entropy.loops_jit import Bytes, Longs, Numbers
from core.tensors.entropy.models import SymbolModel, expected_bits
from core.tensors.entropy.windows import model_of_counts

VERSION = 1
ROWS, COLUMNS = 0, 1
_CLASSES = range(-16, 57)  # k of the standard deviations 2^(k/8)
_NEARBY = 512  # numbers farther out are taken for the farthest when classes are chosen
_FLOOR = 2.0**-16  # of probabilities
_MODEL_BITS = 400  # about what one more model costs
Doubles = NDArray[np.float64]


def encode_matrix(codes: Numbers, axis: int = COLUMNS, width: int = 1) -> Bytes:
    """Bytes of a matrix of integers; `width` neighbouring rows (axis 0) or columns (axis 1) share a model."""
    turned = np.ascontiguousarray(codes.T if axis == COLUMNS else codes)
    width = max(1, min(width, turned.shape[0]))
    groups = -(-turned.shape[0] // width)
    ids = _classes(turned, width, groups) if turned.size else np.zeros(groups, np.int64)
    ids = np.unique(ids, return_inverse=True)[1].reshape(-1)
    stored_ids = encode(ids).tobytes()
    start = bytes([VERSION, axis]) + layout.varint(width) + layout.varint(len(stored_ids)) + stored_ids
    sealed = layout.sealed(start + bytes(-len(start) % 4))
    return np.concatenate([sealed, _coded(turned, ids, width)])


def decode_matrix(data: Bytes | bytes, shape: tuple[int, int], dtype: DType = np.int32, threads: int = 1) -> Numbers:
    """The matrix of that shape; InvalidCheckpoint where the bytes hold no such matrix."""
    data = np.frombuffer(bytearray(data), np.uint8) if isinstance(data, bytes) else data
    reader = Reader(data)
    version, axis = reader.byte(), reader.byte()
    if version != VERSION or axis not in {ROWS, COLUMNS}:
        raise InvalidCheckpoint(f"a coded matrix of version {version}, axis {axis}", hint="written by a later version?")
    lines, length = shape if axis == ROWS else shape[::-1]
    width = reader.varint(max(lines, 1), "rows of a group")
    if width == 0:
        raise InvalidCheckpoint("a coded matrix with groups of no rows")
    size = reader.varint(data.size - reader.at, "length of the classes")
    groups, begin = -(-lines // width), reader.at
    ids = decode_sequence(data[begin : begin + size].copy(), groups, np.int64).astype(np.int64)
    reader.at += size
    reader.align()
    at = reader.at + layout.CHECKSUM_BYTES
    if layout.checksum(data[: reader.at].copy()) != int.from_bytes(data[reader.at : at].tobytes(), "little"):
        raise InvalidCheckpoint("a coded matrix is damaged: the checksum of its classes differs")
    sequence, decoded = CodedSequence.parse(data[at:], lines * length), np.empty(lines * length, dtype)
    if len(sequence.models) > 1 and list(sequence.plan.segments) != _segments(ids, width, lines, length):
        raise InvalidCheckpoint("a coded matrix whose classes are not those of its numbers")
    sequence.decode(decoded, threads=threads)
    turned = np.empty((lines, length), dtype)
    turned[_order(ids, width, lines)] = decoded.reshape(lines, length)
    return turned if axis == ROWS else np.ascontiguousarray(turned.T)


def _order(ids: Longs, width: int, lines: int) -> Longs:
    """The rows in the order in which they are coded."""
    rows = np.argsort(ids, kind="stable")[:, None] * width + np.arange(width)
    flat = rows.reshape(-1)
    return np.asarray(flat[flat < lines], np.int64)


def _segments(ids: Longs, width: int, lines: int, length: int) -> list[Segment]:
    """How many numbers each class has; there is one segment for each."""
    used, of_rows = np.unique(np.repeat(ids, width)[:lines], return_counts=True)
    return [Segment(number, rows * length) for number, rows in zip(used.tolist(), of_rows.tolist(), strict=True)]


def _coded(turned: Numbers, ids: Longs, width: int) -> Bytes:
    """The numbers, a segment for each class."""
    lines, length = turned.shape
    ordered = turned[_order(ids, width, lines)].reshape(-1)
    if ordered.size == 0 or ids.max() == 0:
        return encode(ordered)
    segments = _segments(ids, width, lines, length)
    models, first = [], 0
    for segment in segments:
        models.append(_model(ordered[first : first + segment.count]))
        first += segment.count
    return encode_segments(ordered, models, segments)


def _model(codes: Numbers) -> SymbolModel:
    """Of the numbers themselves, or the best Normal one where that takes less, its own bytes counted."""
    from core.tensors.entropy.windows import counted

    values, counts = counted(codes)
    own = model_of_counts(values, counts)
    std = float(np.sqrt(np.dot(counts, values.astype(np.float64) ** 2) / counts.sum()))
    if std == 0:
        return own
    family = parametric_model("normal", std, weight=int(counts.sum()))
    return min((own, family), key=lambda model: _total_bits(model, values, counts))


def _total_bits(model: SymbolModel, values: Longs, counts: Longs) -> float:
    places = np.clip(values - model.low, -1, model.values)
    inside = (places >= 0) & (places < model.values)
    dense = np.bincount(places[inside], counts[inside], model.size)
    outside = int(counts[~inside].sum())
    if outside and not model.has_escape:
        return float("inf")
    dense[-1] += outside
    return expected_bits(model, dense.astype(np.int64)) + 16 * outside + 8 * len(layout.model_bytes(model))


def _classes(turned: Numbers, width: int, groups: int) -> Longs:
    """The class of each group: the shortest code among standard deviations of one family, rarely used ones left out."""
    near = np.clip(turned, -_NEARBY, _NEARBY).astype(np.int64)
    reach = int(np.abs(near).max())
    counts = np.zeros((groups, 2 * reach + 1))
    for group in range(groups):
        counts[group] = np.bincount(
            (near[group * width : (group + 1) * width] + reach).reshape(-1), minlength=2 * reach + 1
        )
    numbers = np.arange(-reach, reach + 1)
    rows = [_costs(family, k, numbers) for family, k in product(FAMILIES, _CLASSES)]
    bits = (counts @ np.array(rows).T).reshape(groups, len(FAMILIES), len(_CLASSES))
    best = int(bits.min(axis=2).sum(axis=0).argmin())
    return _pruned(bits[:, best])


def _costs(family: str, k: int, numbers: Longs) -> Doubles:
    return -np.log2(np.maximum(probabilities(family, 2 ** (k / 8), numbers), _FLOOR))


def _pruned(bits: Doubles) -> Longs:
    """Class of least bits (groups, classes), without classes that save less than their model costs."""
    kept = np.unique(bits.argmin(axis=1))
    while kept.size > 1:
        ranked = np.sort(bits[:, kept], axis=1)
        chosen = bits[:, kept].argmin(axis=1)
        saved = np.bincount(chosen, ranked[:, 1] - ranked[:, 0], kept.size)
        if saved.min() > _MODEL_BITS:
            break
        kept = np.delete(kept, saved.argmin())
    return np.asarray(kept[bits[:, kept].argmin(axis=1)], np.int64)
