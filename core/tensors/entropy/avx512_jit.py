"""The rANS steps of `loops_jit` for 32 lanes in 512-bit vectors (AVX-512 with BW, VL and VBMI2), bit for bit the same.

numba has no vector type, so the steps are written as LLVM instructions and inlined into compiled functions; where the
machine lacks the instructions nothing here is compiled and `loops_jit` does the work. A state is kept as its low and
its high 16 bits, each the 32 lanes in one vector: what the tables hold are 16-bit numbers, renormalising is a
comparison with 0 and an expansion of the next words, and no product needs more than 16 x 16 bits. Alphabets of at most
256 symbols are looked up in registers (alias tables of up to eight), larger ones are gathered. When decoding, four
streams are worked on in turn, so that the wait of one is filled by the others; encoding waits for gathered slots.

Bounds: a decoding step reads 64 bytes from where it stands and moves on by at most 64. `decode` steps on only while a
whole round of steps fits into the buffer, and otherwise goes on in a copy of its end that has zeros behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils as untyped_cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from core.tensors.entropy.loops_jit import Bytes, Longs, Numbers, Table16, Table32
from core.tensors.kernels.cpu_jit import compiled

LANES = 32
STREAMS = 4  # worked on in turn
ROUND = 64  # steps between two looks at the ends
MARGIN = 2 * LANES * (ROUND + 1)  # bytes that a round may read from where it starts

Value = Any  # an LLVM value, which llvmlite does not annotate
cgutils: Any = untyped_cgutils

_I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
_BYTES, _HALVES, _BOTH = ir.VectorType(_I8, LANES), ir.VectorType(_I16, LANES), ir.VectorType(_I32, LANES)
_WORDS, _FLOATS = ir.VectorType(_I32, 16), ir.VectorType(ir.FloatType(), 16)
_MASK, _MASK16 = ir.VectorType(ir.IntType(1), LANES), ir.VectorType(ir.IntType(1), 16)


class _Emitter:
    """Instructions on 32 x 16 bits. Seen as 16 x 32 bits, even lanes are the low halves and odd ones the high."""

    def __init__(self, builder: Value, precision: Value) -> None:
        self.b, self.precision = builder, precision
        self.precision16 = self.splat(builder.trunc(precision, _I16))

    def call(self, name: str, result: Value, *values: Value) -> Value:
        kind = ir.FunctionType(result, [value.type for value in values])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), values)

    def at(self, address: Value, kind: Value, offset: int = 0) -> Value:
        return self.b.inttoptr(self.b.add(address, ir.Constant(_I64, offset)), kind.as_pointer())

    def load(self, address: Value, kind: Value, offset: int = 0) -> Value:
        found = self.b.load(self.at(address, kind, offset))
        found.align = 1
        return found

    def store(self, value: Value, address: Value, offset: int = 0) -> None:
        self.b.store(value, self.at(address, value.type, offset)).align = 1

    def splat(self, value: Value) -> Value:
        """A 16-bit number in all lanes."""
        one = self.b.insert_element(ir.Constant(_HALVES, ir.Undefined), value, ir.Constant(_I32, 0))
        return self.b.shuffle_vector(one, one, ir.Constant(_BOTH, [0] * LANES))

    def splat32(self, value: Value) -> Value:
        one = self.b.insert_element(ir.Constant(_WORDS, ir.Undefined), value, ir.Constant(_I32, 0))
        return self.b.shuffle_vector(one, one, ir.Constant(_WORDS, [0] * 16))

    def permuted(self, table: list[Value], index: Value) -> Value:
        """table[index], the table in 1, 2, 4 or 8 registers; higher bits of the index are ignored."""
        if len(table) == 1:
            return self.call("llvm.x86.avx512.permvar.hi.512", _HALVES, table[0], index)
        if len(table) == 2:
            return self.call("llvm.x86.avx512.vpermi2var.hi.512", _HALVES, table[0], index, table[1])
        half = len(table) // 2
        bit = self.b.and_(index, ir.Constant(_HALVES, [LANES * half] * LANES))
        is_upper = self.b.icmp_unsigned("!=", bit, ir.Constant(_HALVES, [0] * LANES))
        return self.b.select(is_upper, self.permuted(table[half:], index), self.permuted(table[:half], index))

    def gathered(self, address: Value, index: Value, scale: int) -> Value:
        """32 bits at address + index * scale, for 16 lanes."""
        passed, everywhere = ir.Constant(_WORDS, [0] * 16), ir.Constant(_MASK16, [1] * 16)
        base = self.b.inttoptr(address, _I8.as_pointer())
        name = "llvm.x86.avx512.mask.gather.dpi.512"
        return self.call(name, _WORDS, passed, base, index, everywhere, ir.Constant(_I32, scale))

    def even(self, halves: Value) -> Value:
        return self.b.and_(self.b.bitcast(halves, _WORDS), ir.Constant(_WORDS, [0xFFFF] * 16))

    def odd(self, halves: Value) -> Value:
        return self.b.lshr(self.b.bitcast(halves, _WORDS), ir.Constant(_WORDS, [16] * 16))

    def low_halves(self, even: Value, odd: Value) -> Value:
        """The low 16 bits of both, lanes in turn."""
        low = self.b.and_(even, ir.Constant(_WORDS, [0xFFFF] * 16))
        return self.b.bitcast(self.b.or_(low, self.b.shl(odd, ir.Constant(_WORDS, [16] * 16))), _HALVES)

    def high_halves(self, even: Value, odd: Value) -> Value:
        high = self.b.and_(odd, ir.Constant(_WORDS, [0xFFFF0000] * 16))
        return self.b.bitcast(self.b.or_(high, self.b.lshr(even, ir.Constant(_WORDS, [16] * 16))), _HALVES)

    def population(self, mask: Value) -> tuple[Value, Value]:
        """How many bytes the words of a mask take, and how many words they are."""
        count = self.call("llvm.ctpop.i32", _I32, self.b.bitcast(mask, _I32))
        return self.b.shl(self.b.zext(count, _I64), ir.Constant(_I64, 1)), count


class _Stream:
    """What one stream carries from step to step: halves of its states, where it reads or writes words, and codes."""

    def __init__(self, emit: _Emitter, states: Value, words: Value, codes: Value, number: int) -> None:
        self.emit, self.number, self.homes = emit, number, (states, words, codes)
        loaded = (
            emit.load(states, _HALVES, 128 * number),
            emit.load(states, _HALVES, 128 * number + 64),
            emit.load(words, _I64, 8 * number),
            emit.load(codes, _I64, 8 * number),
        )
        self.low, self.high, self.word, self.code = (cgutils.alloca_once_value(emit.b, value) for value in loaded)

    def put_back(self) -> None:
        states, words, codes = self.homes
        load = self.emit.b.load
        self.emit.store(load(self.low), states, 128 * self.number)
        self.emit.store(load(self.high), states, 128 * self.number + 64)
        self.emit.store(load(self.word), words, 8 * self.number)
        self.emit.store(load(self.code), codes, 8 * self.number)


class _AliasLookup:
    """low half -> (symbol, rank, frequency), all tables in registers."""

    def __init__(self, emit: _Emitter, table: Value, _frequencies: Value, registers: int) -> None:
        self.emit, b = emit, emit.b
        places = range(0, 5 * registers, registers)
        self.tables = [[emit.load(table, _HALVES, 64 * (at + r)) for r in range(registers)] for at in places]
        shift = b.sub(b.trunc(emit.precision, _I16), ir.Constant(_I16, 4 + registers.bit_length()))
        self.shift = emit.splat(shift)
        self.room = emit.splat(b.sub(b.shl(ir.Constant(_I16, 1), shift), ir.Constant(_I16, 1)))
        self.last = ir.Constant(_HALVES, [LANES * registers - 1] * LANES)

    def __call__(self, low: Value) -> tuple[Value, Value, Value]:
        b, found = self.emit.b, self.emit.permuted
        threshold, alias, own_add, alias_add, frequency = self.tables
        bucket, place = b.and_(b.lshr(low, self.shift), self.last), b.and_(low, self.room)
        is_other = b.icmp_unsigned(">=", place, found(threshold, bucket))
        symbol = b.select(is_other, found(alias, bucket), bucket)
        added = b.select(is_other, found(alias_add, bucket), found(own_add, bucket))
        return symbol, b.add(place, added), found(frequency, symbol)


class _GatheredLookup:
    """The same by the slots' entries and the symbols' frequencies in memory."""

    def __init__(self, emit: _Emitter, table: Value, frequencies: Value, _registers: int) -> None:
        self.emit, self.table, self.frequencies = emit, table, frequencies
        one = ir.Constant(_I16, 1)
        self.mask = emit.splat(emit.b.sub(emit.b.shl(one, emit.b.trunc(emit.precision, _I16)), one))

    def __call__(self, low: Value) -> tuple[Value, Value, Value]:
        emit, b = self.emit, self.emit.b
        slot = b.and_(low, self.mask)
        entries = [emit.gathered(self.table, part, 4) for part in (emit.even(slot), emit.odd(slot))]
        symbols = [b.lshr(entry, ir.Constant(_WORDS, [16] * 16)) for entry in entries]
        frequencies = [emit.gathered(self.frequencies, symbol, 4) for symbol in symbols]
        return emit.high_halves(*entries), emit.low_halves(*entries), emit.low_halves(*frequencies)


def _decode_step(emit: _Emitter, stream: _Stream, lookup: Any, added: Value, wide: bool) -> None:
    """x = f * (x >> P) + r in halves, the next word where x < 2^16, and 32 codes."""
    b, shift = emit.b, emit.precision16
    low, high = b.load(stream.low), b.load(stream.high)
    symbol, rank, frequency = lookup(low)
    quotient, top = emit.call("llvm.fshr.v32i16", _HALVES, high, low, shift), b.lshr(high, shift)
    product = b.mul(b.zext(frequency, _BOTH), b.zext(quotient, _BOTH))
    upper = b.trunc(b.lshr(product, ir.Constant(_BOTH, [16] * LANES)), _HALVES)
    low = b.add(b.mul(frequency, quotient), rank)
    carry = b.sext(b.icmp_unsigned("<", low, rank), _HALVES)
    high = b.sub(b.add(upper, b.mul(frequency, top)), carry)
    needs = b.icmp_unsigned("==", high, ir.Constant(_HALVES, [0] * LANES))
    word = b.load(stream.word)
    b.store(b.select(needs, low, high), stream.high)
    words = emit.load(word, _HALVES)
    b.store(emit.call("llvm.x86.avx512.mask.expand.v32i16", _HALVES, words, low, needs), stream.low)
    b.store(b.add(word, emit.population(needs)[0]), stream.word)
    code, codes = b.load(stream.code), b.add(symbol, added)
    emit.store(codes if wide else b.trunc(codes, _BYTES), code)
    b.store(b.add(code, ir.Constant(_I64, 2 * LANES if wide else LANES)), stream.code)


class _AliasRecords:
    """index -> (frequency, base, reciprocal of even lanes, of odd lanes) and slots, tables in registers."""

    def __init__(self, emit: _Emitter, table: Value, slots: Value, registers: int) -> None:
        self.emit, self.slots = emit, slots
        places = range(0, 4 * registers, registers)
        self.tables = [[emit.load(table, _HALVES, 64 * (at + r)) for r in range(registers)] for at in places]

    def codes(self, address: Value) -> Value:
        return self.emit.b.zext(self.emit.load(address, _BYTES), _HALVES)

    def __call__(self, index: Value) -> tuple[Value, Value, Value, Value]:
        emit, b = self.emit, self.emit.b
        frequency, base, low, high = (emit.permuted(table, index) for table in self.tables)
        sixteen = ir.Constant(_WORDS, [16] * 16)
        even = b.or_(emit.even(low), b.shl(emit.even(high), sixteen))
        odd = b.or_(emit.odd(low), b.shl(emit.odd(high), sixteen))
        return frequency, base, even, odd

    def slot(self, place: Value) -> Value:
        wanted = self.emit.gathered(self.slots, place, 2)
        return self.emit.b.and_(wanted, ir.Constant(_WORDS, [0xFFFF] * 16))


class _GatheredRecords:
    """The same by records of frequency + (base << 16) and reciprocals in memory; slots follow each other."""

    def __init__(self, emit: _Emitter, table: Value, reciprocals: Value, _registers: int) -> None:
        self.emit, self.table, self.reciprocals = emit, table, reciprocals

    def codes(self, address: Value) -> Value:
        return self.emit.load(address, _HALVES)

    def __call__(self, index: Value) -> tuple[Value, Value, Value, Value]:
        emit = self.emit
        parts = (emit.even(index), emit.odd(index))
        records = [emit.gathered(self.table, part, 4) for part in parts]
        even, odd = (emit.gathered(self.reciprocals, part, 4) for part in parts)
        return emit.low_halves(*records), emit.high_halves(*records), even, odd

    def slot(self, place: Value) -> Value:
        return place


def _encode_step(emit: _Emitter, stream: _Stream, records: Any, wide: bool) -> None:
    """Pushes the words of full states, then x = (x div f << P) + slot(s, x mod f); codes are read backwards."""
    b = emit.b
    code = b.sub(b.load(stream.code), ir.Constant(_I64, 2 * LANES if wide else LANES))
    b.store(code, stream.code)
    low, high = b.load(stream.low), b.load(stream.high)
    frequency, base, *reciprocals = records(records.codes(code))
    rest = b.sub(ir.Constant(_HALVES, [16] * LANES), emit.precision16)
    is_full = b.icmp_unsigned(">=", b.lshr(high, rest), frequency)
    nothing = ir.Constant(_HALVES, [0] * LANES)
    pushed = emit.call("llvm.x86.avx512.mask.compress.v32i16", _HALVES, low, nothing, is_full)
    width, count = emit.population(is_full)
    word = b.sub(b.load(stream.word), width)
    b.store(word, stream.word)
    ones = b.sub(b.shl(ir.Constant(_I64, 1), b.zext(count, _I64)), ir.Constant(_I64, 1))
    kept = b.bitcast(b.trunc(ones, _I32), _MASK)
    place = emit.at(word, _HALVES)
    emit.call("llvm.masked.store.v32i16.p0", ir.VoidType(), pushed, place, ir.Constant(_I32, 1), kept)
    low, high = b.select(is_full, high, low), b.select(is_full, nothing, high)
    sixteen, shift = ir.Constant(_WORDS, [16] * 16), emit.splat32(b.trunc(emit.precision, _I32))
    states = []
    for part, reciprocal in zip((emit.even, emit.odd), reciprocals, strict=True):
        state = b.or_(part(low), b.shl(part(high), sixteen))
        quotient, rank = _divided(b, state, part(frequency), b.bitcast(reciprocal, _FLOATS))
        states.append(b.or_(b.shl(quotient, shift), records.slot(b.add(part(base), rank))))
    b.store(emit.low_halves(*states), stream.low)
    b.store(emit.high_halves(*states), stream.high)


def _divided(b: Value, state: Value, frequency: Value, reciprocal: Value) -> tuple[Value, Value]:
    """(x div f, x mod f) by a reciprocal that is a little too small: the estimate is right or one too low."""
    estimate = b.fptoui(b.fmul(b.uitofp(state, _FLOATS), reciprocal), _WORDS)
    rest = b.sub(state, b.mul(estimate, frequency))
    is_low = b.icmp_unsigned(">=", rest, frequency)
    return b.sub(estimate, b.sext(is_low, _WORDS)), b.select(is_low, b.sub(rest, frequency), rest)


def _intrinsic(generate: Callable[..., Any]) -> Callable[..., None]:
    """fn(table, more, precision, steps, states, words, codes, added) of int64: numbers and addresses."""

    def steps(
        _typing: Value, _a: Value, _b: Value, _c: Value, _d: Value, _e: Value, _f: Value, _g: Value, _h: Value
    ) -> Value:
        return types.void(*[types.int64] * 8), generate

    return cast("Callable[..., None]", intrinsic(steps))


def _decoder(streams: int, lookup: type, registers: int, wide: bool) -> Callable[..., None]:
    """Steps of some streams; `more`: frequencies, which a lookup in registers does not need."""

    def generate(_context: Value, b: Value, _signature: Value, values: Value) -> Value:
        table, frequencies, precision, steps, states, words, codes, added = values
        emit = _Emitter(b, precision)
        find, plus = lookup(emit, table, frequencies, registers), emit.splat(b.trunc(added, _I16))
        work = [_Stream(emit, states, words, codes, number) for number in range(streams)]
        with cgutils.for_range(b, steps):
            for stream in work:
                _decode_step(emit, stream, find, plus, wide)
        for stream in work:
            stream.put_back()
        return _context.get_dummy_value()

    return _intrinsic(generate)


def _encoder(records: type, registers: int, wide: bool) -> Callable[..., None]:
    """Steps of one stream; `more`: slots or reciprocals; nothing is added."""

    def generate(_context: Value, b: Value, _signature: Value, values: Value) -> Value:
        table, more, precision, steps, states, words, codes, _ = values
        emit = _Emitter(b, precision)
        find, stream = records(emit, table, more, registers), _Stream(emit, states, words, codes, 0)
        with cgutils.for_range(b, steps):
            _encode_step(emit, stream, find, wide)
        stream.put_back()
        return _context.get_dummy_value()

    return _intrinsic(generate)


_decode_32, _decode_32_4 = (_decoder(n, _AliasLookup, 1, False) for n in (1, STREAMS))
_decode_64, _decode_64_4 = (_decoder(n, _AliasLookup, 2, False) for n in (1, STREAMS))
_decode_128, _decode_128_4 = (_decoder(n, _AliasLookup, 4, False) for n in (1, STREAMS))
_decode_256, _decode_256_4 = (_decoder(n, _AliasLookup, 8, False) for n in (1, STREAMS))
_decode_more, _decode_more_4 = (_decoder(n, _GatheredLookup, 0, True) for n in (1, STREAMS))
_encode_32, _encode_64 = _encoder(_AliasRecords, 1, False), _encoder(_AliasRecords, 2, False)
_encode_128, _encode_256 = _encoder(_AliasRecords, 4, False), _encoder(_AliasRecords, 8, False)
_encode_more = _encoder(_GatheredRecords, 0, True)


@compiled
def decode(
    buckets: int,
    data: Bytes,
    tail: Bytes,
    places: Longs,
    states: Table16,
    precision: int,
    table: Table16,
    entries: Table32,
    frequencies: Table32,
    added: int,
    out: Numbers,
    steps: int,
) -> int:
    """`steps` steps of streams i: words from data[places[0, i]:], codes to out[places[2, i]:]; 1 or STREAMS streams.

    The answer is -1, or a stream that read beyond places[1, i]. `buckets`: 32, 64, 128 or 256 of the alias `table`
    (codes uint8), or 0 for `entries` and `frequencies` (codes uint16); the other tables are not looked at. `tail`: the
    end of the data, as much as there is of MARGIN bytes, and MARGIN zeros; `states` (streams, 2, 32): low and high
    halves. places[0] and states are moved on.
    """
    ats, stops, firsts = places[0], places[1], places[2]
    words, codes = np.empty(ats.size, np.int64), np.empty(ats.size, np.int64)
    for i in range(ats.size):
        codes[i] = out.ctypes.data + firsts[i] * out.itemsize
    source, more = entries.ctypes.data, frequencies.ctypes.data
    if buckets:
        source, more = table.ctypes.data, table.ctypes.data
    tail_at = tail.ctypes.data - (data.size + MARGIN - tail.size)
    for done in range(0, steps, ROUND):
        for i in range(ats.size):
            if ats[i] > stops[i]:
                return i
            words[i] = ats[i] + (data.ctypes.data if ats[i] + MARGIN <= data.size else tail_at)
        before = words.copy()
        count = min(ROUND, steps - done)
        _decode_round(buckets, source, more, precision, count, states.ctypes.data, words, codes, added)
        ats += words - before
    for i in range(ats.size):
        if ats[i] > stops[i]:
            return i
    return -1


@compiled
def _decode_round(
    buckets: int,
    table: int,
    more: int,
    precision: int,
    count: int,
    states: int,
    words: Longs,
    codes: Longs,
    added: int,
) -> None:
    at, to, alone = words.ctypes.data, codes.ctypes.data, words.size == 1
    if buckets == 32 and alone:
        _decode_32(table, more, precision, count, states, at, to, added)
    elif buckets == 32:
        _decode_32_4(table, more, precision, count, states, at, to, added)
    elif buckets == 64 and alone:
        _decode_64(table, more, precision, count, states, at, to, added)
    elif buckets == 64:
        _decode_64_4(table, more, precision, count, states, at, to, added)
    elif buckets == 128 and alone:
        _decode_128(table, more, precision, count, states, at, to, added)
    elif buckets == 128:
        _decode_128_4(table, more, precision, count, states, at, to, added)
    elif buckets == 256 and alone:
        _decode_256(table, more, precision, count, states, at, to, added)
    elif buckets == 256:
        _decode_256_4(table, more, precision, count, states, at, to, added)
    elif alone:
        _decode_more(table, more, precision, count, states, at, to, added)
    else:
        _decode_more_4(table, more, precision, count, states, at, to, added)


@compiled
def encode(
    buckets: int,
    indices: Numbers,
    steps: int,
    states: Table16,
    precision: int,
    table: Table16,
    slots: Table16,
    records: Table32,
    reciprocals: NDArray[np.float32],
    words: Bytes,
    at: int,
) -> int:
    """The steps of indices[: steps * LANES], last to first; words are written before words[at]; the new end.

    `buckets` as in `decode`; `indices`: uint8, without buckets uint16. `table` (4, buckets): frequency, base, low and
    high half of the reciprocal; `slots` has one number more than there are slots. Without buckets `records` (frequency
    + (base << 16)) and `reciprocals`. Room for two bytes a symbol is the caller's affair. Precisions from 12 on.
    """
    to, code = np.empty(1, np.int64), np.empty(1, np.int64)
    to[0] = words.ctypes.data + at
    code[0] = indices.ctypes.data + steps * LANES * indices.itemsize
    source, more, lanes = table.ctypes.data, slots.ctypes.data, states.ctypes.data
    if buckets == 32:
        _encode_32(source, more, precision, steps, lanes, to.ctypes.data, code.ctypes.data, 0)
    elif buckets == 64:
        _encode_64(source, more, precision, steps, lanes, to.ctypes.data, code.ctypes.data, 0)
    elif buckets == 128:
        _encode_128(source, more, precision, steps, lanes, to.ctypes.data, code.ctypes.data, 0)
    elif buckets == 256:
        _encode_256(source, more, precision, steps, lanes, to.ctypes.data, code.ctypes.data, 0)
    else:
        source, more = records.ctypes.data, reciprocals.ctypes.data
        _encode_more(source, more, precision, steps, lanes, to.ctypes.data, code.ctypes.data, 0)
    return int(to[0] - words.ctypes.data)
