"""Matrices whose rows or columns have scales of their own: each group of them is coded by the model that suits it.

    u8 version = 1, u8 kind (3 by rows, 4 by columns), varint width: rows or columns of a group, in order
    varint bytes, then a sequence (`layout`): for each group the index of its model
    zeros up to a multiple of 4, and u32 XXH32 of all of that
    a sequence (`layout`): the numbers, one segment for each model, in the order of the models; it may leave them out

Under a model stand its groups in ascending order, and in a group its *lines*, rows or columns, one after the other.
One histogram for all loses 0.05 bit a number where scales vary by a factor of e^0.2, 0.3 at e^0.6; classes of standard
deviations 2^(k/8) lose less than 0.001 (entropy of discretised Normal variables, exact). Classes sort the groups; the
model of those in a class is then made of their numbers, or is the class itself (`classes`), whichever is shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidCheckpoint
from core.tensors.entropy import layout
from core.tensors.entropy.classes import CLASSES, STORED_BYTES
from core.tensors.entropy.coder import encode, encode_segments
from core.tensors.entropy.decoder import CodedSequence, DType
from core.tensors.entropy.decoder import decode as decode_sequence
from core.tensors.entropy.families import FAMILIES, parametric_model, probabilities
from core.tensors.entropy.layout import Reader, Segment
from core.tensors.entropy.loops_jit import Bytes, Longs, Numbers
from core.tensors.entropy.models import SymbolModel
from core.tensors.entropy.windows import model_of_counts

VERSION = 1
ROWS, COLUMNS = 0, 1
KINDS = {3: ROWS, 4: COLUMNS}  # of coded data: those of `layout` are sequences
_NEARBY = 512  # numbers farther out are taken for the farthest when classes are chosen
_FLOOR = 2.0**-16  # of probabilities
_NAMED = {"normal", "laplace"}  # families of classes that files need not describe
_HEAD_BITS = 32  # of a model of frequencies, at least
_CLASS_BITS, _MODEL_BITS = 8 * STORED_BYTES, 400  # of one more model: of such a class, and about, of any other
Doubles = NDArray[np.float64]


def encode_matrix(codes: Numbers, axis: int = COLUMNS, width: int = 1) -> Bytes:
    """Bytes of a matrix of integers; `width` neighbouring rows (axis 0) or columns (axis 1) share a model."""
    turned = _transposed(codes) if axis == COLUMNS else np.ascontiguousarray(codes)
    width = max(1, min(width, turned.shape[0]))
    groups = -(-turned.shape[0] // width)
    ids = _classes(turned, width, groups) if turned.size else np.zeros(groups, np.int64)
    ids = np.unique(ids, return_inverse=True)[1].reshape(-1)
    stored_ids = encode(ids).tobytes()
    kind = next(kind for kind, known in KINDS.items() if known == axis)
    start = bytes([VERSION, kind]) + layout.varint(width) + layout.varint(len(stored_ids)) + stored_ids
    sealed = layout.sealed(start + bytes(-len(start) % 4))
    return np.concatenate([sealed, _coded(turned, ids, width)])


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix whose bytes have been looked through. Line l of the coded order is row or column order[l]."""

    sequence: CodedSequence
    axis: int
    order: Longs
    length: int

    @classmethod
    def parse(cls, data: Bytes | bytes, shape: tuple[int, int]) -> CodedMatrix:
        """Looks through bytes that should hold a matrix of that shape; InvalidCheckpoint where they hold none."""
        data = np.frombuffer(bytearray(data), np.uint8) if isinstance(data, bytes) else data
        reader = Reader(data)
        version, kind = reader.byte(), reader.byte()
        if version != VERSION or kind not in KINDS:
            raise InvalidCheckpoint(
                f"a coded matrix of version {version}, kind {kind}", hint="written by a later version?"
            )
        axis = KINDS[kind]
        lines, length = shape if axis == ROWS else shape[::-1]
        width = reader.varint(max(lines, 1), "rows of a group")
        if width == 0:
            raise InvalidCheckpoint("a coded matrix with groups of no rows")
        ids = _read_ids(reader, -(-lines // width))
        segments = _segments(ids, width, lines, length)
        sequence = CodedSequence.parse(data[reader.at :], lines * length, tuple(segments))
        if len(sequence.models) > 1 and list(sequence.plan.segments) != segments:
            raise InvalidCheckpoint("a coded matrix whose classes are not those of its numbers")
        return cls(sequence, axis, _order(ids, width, lines), length)


def decode_matrix(data: Bytes | bytes, shape: tuple[int, int], dtype: DType = np.int32, threads: int = 1) -> Numbers:
    """The matrix of that shape; InvalidCheckpoint where the bytes hold no such matrix."""
    coded, decoded = CodedMatrix.parse(data, shape), np.empty(shape[0] * shape[1], dtype)
    coded.sequence.decode(decoded, threads=threads)
    turned = np.empty((coded.order.size, coded.length), dtype)
    turned[coded.order] = decoded.reshape(turned.shape)
    return turned if coded.axis == ROWS else _transposed(turned)


def _transposed(matrix: Numbers) -> Numbers:
    """The transposed matrix, contiguous."""
    from core.tensors.entropy.tables_jit import transpose

    if not matrix.flags.c_contiguous:
        return np.ascontiguousarray(matrix.T)
    turned = np.empty(matrix.shape[::-1], matrix.dtype)
    transpose(matrix, turned)
    return turned


def _read_ids(reader: Reader, groups: int) -> Longs:
    """The class of each group; the reader is then behind the checksum."""
    data = reader.data
    size = reader.varint(data.size - reader.at, "length of the classes")
    begin = reader.at
    ids = decode_sequence(data[begin : begin + size].copy(), groups, np.int64).astype(np.int64)
    reader.at += size
    reader.align()
    at = reader.at + layout.CHECKSUM_BYTES
    if layout.checksum(data[: reader.at].copy()) != int.from_bytes(data[reader.at : at].tobytes(), "little"):
        raise InvalidCheckpoint("a coded matrix is damaged: the checksum of its classes differs")
    reader.at = at
    return ids


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
    return encode_segments(ordered, models, segments, are_known=True)


def _model(codes: Numbers) -> SymbolModel:
    """Of the numbers themselves, a class, or the best Normal one: what takes least, its own bytes counted."""
    from core.tensors.entropy.choice import nearest_class, total_bits
    from core.tensors.entropy.windows import counted

    values, counts = counted(codes)
    named = nearest_class(values, counts)
    if named is not None and total_bits(named, values, counts) <= _least_bits(counts):
        return named
    own = model_of_counts(values, counts)
    if named is None:
        return own
    std = float(np.sqrt(np.dot(counts, values.astype(np.float64) ** 2) / counts.sum()))
    family = parametric_model("normal", std, weight=int(counts.sum()))
    return min((named, own, family), key=lambda model: total_bits(model, values, counts))


def _least_bits(counts: Longs) -> float:
    """What a model of frequencies, which is no class, takes at least: the entropy, its head, a bit for each symbol.

    A number without a symbol takes more than the bit of one.
    """
    entropy = float((counts * (np.log2(counts.sum()) - np.log2(counts))).sum())
    return entropy + _HEAD_BITS + counts.size - 1


def class_bits(lines: Numbers) -> float:
    """About how many bits the numbers of a matrix take with a class for each row, models left out."""
    if not lines.size:
        return 0.0
    bits = _group_bits(np.ascontiguousarray(lines), 1, lines.shape[0])
    return float(bits.min(axis=2).sum(axis=0).min())


def class_costs(most: int) -> tuple[Doubles, Doubles]:
    """Standard deviations of the classes, and bits of the numbers 0 to `most` in each, under the Normal family."""
    costs = _costs()[: len(CLASSES), : most + 1]
    return np.array([2.0 ** (k / 8) for k in CLASSES]), costs


def _classes(turned: Numbers, width: int, groups: int) -> Longs:
    """The class of each group: the shortest code among standard deviations of one family, all that it takes counted."""
    from core.tensors.entropy.classes_jit import best_classes

    bits, found = _group_bits(turned, width, groups), np.empty((len(FAMILIES), groups), np.int64)
    costs = [_CLASS_BITS if family in _NAMED and turned.min() < 0 else _MODEL_BITS for family in FAMILIES]
    sizes = [best_classes(bits[:, i].copy(), cost, found[i]) for i, cost in enumerate(costs)]
    return np.asarray(found[int(np.argmin(sizes))], np.int64)


def _group_bits(turned: Numbers, width: int, groups: int) -> Doubles:
    """Bits of each group in each family and class: (groups, families, classes).

    They are taken about the commonest number, as the codes of most formats count from their lowest value.
    """
    from core.tensors.entropy.tables_jit import count_groups
    from core.tensors.entropy.windows import counted

    numbers, times = counted(turned.reshape(-1))
    centre = int(numbers[times.argmax()])
    reach = min(max(centre - int(turned.min()), int(turned.max()) - centre), _NEARBY)
    counts = np.zeros((groups, reach + 1))
    count_groups(turned, width, centre, reach, counts)
    return (counts @ _costs()[:, : reach + 1].T).reshape(groups, len(FAMILIES), len(CLASSES))


@lru_cache(maxsize=1)
def _costs() -> Doubles:
    """Bits of the numbers from 0 to _NEARBY, and of their negatives, in each class of each family."""
    numbers = np.arange(_NEARBY + 1)
    rows = [probabilities(family, 2 ** (k / 8), numbers) for family, k in product(FAMILIES, CLASSES)]
    return np.asarray(-np.log2(np.maximum(rows, _FLOOR)))
