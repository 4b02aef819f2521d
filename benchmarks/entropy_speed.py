"""Size and speed of the entropy coder on one CPU core beside htscodecs, zstd, constriction and a Huffman code of ours.

Codes are integers of a Normal, Laplace or Student-t(5) variable, one a byte. All contenders work by turns within each
round, pinned to one core, rounds alternate in order, and each one's best round counts: rates are millions of numbers a
second of processor time, `encode_of_zstd_1` is our rate over zstd's. Ours is all of it: from numbers to bytes with
histogram, choice of the model and checksums, and checked back into memory that is there. Sizes are all bytes, over the
order-0 entropy of the numbers: percent, and bits a number. zstd (its level 1) and constriction (which is given its
model, and stores none) come with the extra `bench`; htscodecs is its rANS 32x16 of order 0 (Debian: libhtscodecs2, or
--htscodecs FILE); what is not installed is named. Slow ones get the first 2^20 numbers.

Prints a JSON line for each sequence. The promises, at 2, 3 and 4 bits: of 2^24 numbers at most 0.10 % over the entropy,
encoding at 250 M/s, decoding at 900 M/s and 0.45 of htscodecs; of 2^16 numbers at most 0.01 bit a number over it.

    python benchmarks/entropy_speed.py [--log2-numbers 24 16] [--rounds 7] [--families normal ...] [--bits 2 3 4 5]
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
FAMILIES = ("normal", "laplace", "t5")
MOST_PERCENT, LEAST_ENCODE, LEAST_DECODE, LEAST_OF_HTSCODECS = 0.10, 250.0, 900.0, 0.45  # of long sequences
LONG, MOST_BITS, PROMISED_BITS = 24, 0.01, 4.0  # log2 of a long one's numbers; of shorter ones; entropies up to this
WAYS = ("encode", "decode")
RANS_32_WAY = 4  # htscodecs' flag for 32 interleaved states; order 0
PART = 1 << 20  # numbers of the slow ones

Codes = NDArray[np.int8]
Work = Callable[[], object]


@dataclass
class Contender:
    """Both directions, how many bytes come out, and the numbers that go in."""

    encode: Work
    decode: Work
    size: int
    codes: Codes

    @property
    def over(self) -> dict[str, float]:
        """What the size is above the entropy."""
        bits, least = 8 * self.size / self.codes.size, entropy(self.codes)
        return {"over_percent": round(100 * (bits / least - 1), 4), "over_bits": round(bits - least, 5)}


def seconds(work: Work) -> float:
    """Processor time of one call: what others do on the machine counts little."""
    started = process_time()
    work()
    return process_time() - started


def entropy(codes: Codes) -> float:
    counts = np.bincount(codes.view(np.uint8), minlength=256) / codes.size
    used = counts[counts > 0]
    return float(-(used * np.log2(used)).sum())


def sample(family: str, count: int, bits: float) -> Codes:
    """Numbers of that entropy: the step is found on a part of them."""
    random = np.random.default_rng(0)
    if family == "normal":
        drawn = random.standard_normal(count)
    else:
        drawn = random.laplace(size=count) if family == "laplace" else random.standard_t(5, count)
    step = 1.0
    for _ in range(30):
        step *= 2 ** (entropy(rounded(drawn[: 1 << 18], step)) - bits)
    return rounded(drawn, step)


def rounded(drawn: NDArray[np.float64], step: float) -> Codes:
    codes: Codes = np.clip(np.rint(drawn / step), -128, 127).astype(np.int8)
    return codes


def ours(codes: Codes) -> Contender:
    from core.tensors.entropy.coder import encode
    from core.tensors.entropy.decoder import CodedSequence

    data, out = encode(codes), np.zeros_like(codes)
    CodedSequence.parse(data, codes.size).decode(out)
    assert np.array_equal(out, codes)
    return Contender(lambda: encode(codes), lambda: CodedSequence.parse(data, codes.size).decode(out), data.size, codes)


def parts(codes: Codes) -> dict[str, float]:
    """What our size above the entropy consists of, percent of the entropy; together they are `over_percent`.

    rounding: of frequencies, and escaped values; granularity: of states of 32 bits, and the last step filled up;
    streams: states less what they carry, directory, checksums; model: all that stands before the directory.
    """
    from core.tensors.entropy.coder import encode
    from core.tensors.entropy.decoder import CodedSequence
    from core.tensors.entropy.layout import rans_head

    data = encode(codes)
    sequence = CodedSequence.parse(data, codes.size)
    (model,), places, wide = sequence.models, sequence.places, sequence.escape_dtype.itemsize == 4
    values, counts = np.unique(codes, return_counts=True)
    symbols = np.where((values < model.low) | (values > model.high), model.size - 1, values - np.int64(model.low))
    costs, escaped = model.costs[symbols], 8 * sequence.escape_dtype.itemsize * sum(place.escaped for place in places)
    costs = np.where(np.isinf(costs), model.costs[-1], costs)
    states = np.concatenate([data[place.states : place.escapes].view("<u4") for place in places])
    words, carried = 16 * sum((place.stop - place.words) // 2 for place in places), (np.log2(states) - 16).sum()
    ideal, head = float(counts @ costs), 8 * len(rans_head(sequence.plan, sequence.models, wide))
    least = entropy(codes) * codes.size
    bits = {"rounding": ideal + escaped - least, "granularity": words + carried - ideal, "model": head}
    bits["streams"] = 8 * data.size - head - words - carried - escaped
    return {f"ours_{name}_percent": round(100 * float(part) / least, 4) for name, part in bits.items()}


def huffman(codes: Codes) -> Contender:
    from core.tensors.entropy.huffman import huffman_decode, huffman_encode

    data = huffman_encode(codes)
    return Contender(lambda: huffman_encode(codes), lambda: huffman_decode(data, codes.size, np.int8), data.size, codes)


def htscodecs(codes: Codes, name: str) -> Contender:
    """rANS 32x16 by the library's own choice of instructions, into buffers that are there."""
    library = ctypes.CDLL(name)
    source, out = codes.view(np.uint8), np.zeros(codes.size, np.uint8)
    data = np.zeros(int(library.rans_compress_bound_4x16(codes.size, RANS_32_WAY)), np.uint8)
    size, length = ctypes.c_uint(data.size), ctypes.c_uint(out.size)

    def pointer(array: NDArray[np.uint8]) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    def encode() -> None:
        size.value = data.size
        library.rans_compress_to_4x16(pointer(source), source.size, pointer(data), ctypes.byref(size), RANS_32_WAY)

    def decode() -> None:
        length.value = out.size
        library.rans_uncompress_to_4x16(pointer(data), size.value, pointer(out), ctypes.byref(length))

    library.rans_compress_to_4x16.restype = library.rans_uncompress_to_4x16.restype = ctypes.c_void_p
    encode()
    decode()
    assert np.array_equal(out, source)
    return Contender(encode, decode, size.value, codes)


def zstd(codes: Codes) -> Contender:
    zstandard = importlib.import_module("zstandard")
    packer, unpacker, source = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor(), codes.tobytes()
    data = packer.compress(source)
    return Contender(lambda: packer.compress(source), lambda: unpacker.decompress(data), len(data), codes)


def constriction(codes: Codes) -> Contender:
    """Its ANS coder with the histogram as model; the model is not in the bytes."""
    stream = importlib.import_module("constriction").stream
    low = int(codes.min())
    symbols = codes.astype(np.int32) - low
    model = stream.model.Categorical(np.bincount(symbols) / codes.size, perfect=False)

    def encode() -> NDArray[np.uint32]:
        coder = stream.stack.AnsCoder()
        coder.encode_reverse(symbols, model)
        found: NDArray[np.uint32] = coder.get_compressed()
        return found

    data = encode()
    return Contender(encode, lambda: stream.stack.AnsCoder(data).decode(model, symbols.size), data.nbytes, codes)


def contenders(codes: Codes, library: str | None) -> tuple[dict[str, Contender], list[str]]:
    """What is timed, and what is missing."""
    part = codes[:PART]
    found, missing = {"ours": ours(codes), "huffman": huffman(part)}, []
    if library:
        found["htscodecs"] = htscodecs(codes, library)
    else:
        missing.append("htscodecs")
    for name, module, make in (("zstd_1", "zstandard", zstd), ("constriction", "constriction", constriction)):
        if importlib.util.find_spec(module):
            found[name] = make(part)
        else:
            missing.append(name)
    return found, missing


def measure(works: dict[str, Contender], rounds: int) -> dict[str, tuple[float, float]]:
    """Millions of numbers a second, encoded and decoded, in the best round of each."""
    least = {name: (float("inf"), float("inf")) for name in works}
    for number in range(rounds + 1):
        for name in list(works) if number % 2 else list(reversed(works)):
            taken = seconds(works[name].encode), seconds(works[name].decode)
            least[name] = min(least[name][0], taken[0]), min(least[name][1], taken[1])
    return {
        name: (works[name].codes.size / encode / 1e6, works[name].codes.size / decode / 1e6)
        for name, (encode, decode) in least.items()
    }


def report(codes: Codes, bits: float, library: str | None, rounds: int) -> dict[str, object]:
    """What a line says of a sequence of about so many bits a number."""
    works, missing = contenders(codes, library)
    rates = measure(works, rounds)
    line: dict[str, object] = {"entropy": round(entropy(codes), 4), "missing": missing}
    for name, work in works.items():
        encode, decode = rates[name]
        found = work.over | {"encode": round(encode, 1), "decode": round(decode, 1)}
        line |= {f"{name}_{key}": value for key, value in found.items()}
        if name != "ours":
            line |= {f"{way}_of_{name}": round(rates["ours"][i] / rates[name][i], 2) for i, way in enumerate(WAYS)}
    return line | parts(codes) | {"as_promised": as_promised(codes.size, bits, line)}


def as_promised(numbers: int, bits: float, line: dict[str, Any]) -> bool | None:
    """None where nothing is promised."""
    if bits > PROMISED_BITS:
        return None
    if numbers < 1 << LONG:
        return bool(line["ours_over_bits"] <= MOST_BITS)
    of_htscodecs = line.get("decode_of_htscodecs", LEAST_OF_HTSCODECS)
    is_fast = line["ours_encode"] >= LEAST_ENCODE and line["ours_decode"] >= LEAST_DECODE
    return bool(line["ours_over_percent"] <= MOST_PERCENT and is_fast and of_htscodecs >= LEAST_OF_HTSCODECS)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--log2-numbers", nargs="+", type=int, default=[24, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--bits", nargs="+", type=float, default=[2, 3, 4, 5])
    parser.add_argument("--htscodecs", default=ctypes.util.find_library("htscodecs"), help="file of the library")
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from core.tensors.entropy.machine import has_wide_vectors

    loops = "avx512" if has_wide_vectors() else "portable"
    about = {"benchmark": "entropy_speed", "rounds": given.rounds, "loops": loops}
    for length, family, bits in product(given.log2_numbers, given.families, given.bits):
        line = report(sample(family, 1 << length, bits), bits, given.htscodecs, given.rounds)
        print(json.dumps(about | {"log2_numbers": length, "family": family, "bits": bits} | line), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
