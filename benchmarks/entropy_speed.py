"""Size and speed of the entropy coder on one CPU core beside htscodecs, zstd, constriction and a Huffman code of ours.

Codes are integers of a Normal, Laplace or Student-t(5) variable, one a byte. All contenders work by turns within each
round, pinned to one core, rounds alternate in order, and each one's best round counts: rates are millions of numbers a
second of processor time. Ours is all of it, from numbers to bytes (histogram, choice of the model, checksums) and back
into memory that is there, checked; so are the others'. Sizes are all bytes, as percent over the order-0 entropy.
htscodecs is its rANS 32x16 of order 0 (Debian: libhtscodecs2, or --htscodecs FILE), zstd its level 1; what is not
installed is named. Slow ones get a part. Prints a JSON line for each entropy; the promise is at most 0.10 % over the
entropy for 2^24 numbers at 2, 3 and 4 bits, decoding at 900 M/s and 0.45 of htscodecs, encoding at 250 M/s.

    python benchmarks/entropy_speed.py [--log2-numbers 24] [--rounds 7] [--families normal ...] [--bits 2 3 4 5]
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
from pathlib import Path
from time import process_time

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
FAMILIES = ("normal", "laplace", "t")
MOST_OVERHEAD, LEAST_DECODE, LEAST_OF_HTSCODECS, LEAST_ENCODE = 0.10, 900.0, 0.45, 250.0
RANS_32_WAY = 4  # htscodecs' flag for 32 interleaved states; order 0
SHARE = 16  # the slow ones get one number of this many

Codes = NDArray[np.int8]
Work = Callable[[], object]


@dataclass
class Contender:
    """Both directions, the bytes that come out, and how many numbers go in."""

    encode: Work
    decode: Work
    size: int
    numbers: int


def seconds(work: Work) -> float:
    """Processor time of one call: what others do on the machine counts little."""
    started = process_time()
    work()
    return process_time() - started


def entropy(codes: Codes) -> float:
    counts = np.unique(codes, return_counts=True)[1] / codes.size
    return float(-(counts * np.log2(counts)).sum())


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
    return Contender(
        lambda: encode(codes), lambda: CodedSequence.parse(data, codes.size).decode(out), data.size, codes.size
    )


def huffman(codes: Codes) -> Contender:
    from core.tensors.entropy.huffman import huffman_decode, huffman_encode

    data = huffman_encode(codes)
    return Contender(
        lambda: huffman_encode(codes), lambda: huffman_decode(data, codes.size, np.int8), data.size, codes.size
    )


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
    return Contender(encode, decode, size.value, codes.size)


def zstd(codes: Codes) -> Contender:
    zstandard = importlib.import_module("zstandard")
    packer, unpacker, source = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor(), codes.tobytes()
    data = packer.compress(source)
    return Contender(lambda: packer.compress(source), lambda: unpacker.decompress(data), len(data), codes.size)


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
    return Contender(encode, lambda: stream.stack.AnsCoder(data).decode(model, symbols.size), data.nbytes, codes.size)


def contenders(codes: Codes, library: str | None) -> tuple[dict[str, Contender], list[str]]:
    """What is timed, and what is missing."""
    part = codes[: codes.size // SHARE]
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
        name: (works[name].numbers / encode / 1e6, works[name].numbers / decode / 1e6)
        for name, (encode, decode) in least.items()
    }


def report(codes: Codes, library: str | None, rounds: int) -> dict[str, object]:
    """The line of one sample."""
    works, missing = contenders(codes, library)
    rates, whole = measure(works, rounds), entropy(codes)
    part = entropy(codes[: codes.size // SHARE])
    line: dict[str, object] = {"entropy": round(whole, 4), "missing": missing}
    for name, work in works.items():
        bits = 8 * work.size / work.numbers
        over = bits / (whole if work.numbers == codes.size else part) - 1
        line |= {f"{name}_over_percent": round(100 * over, 4)}
        line |= {f"{name}_encode": round(rates[name][0]), f"{name}_decode": round(rates[name][1])}
    line["over_bits"] = round(8 * works["ours"].size / codes.size - whole, 5)
    encode, decode = rates["ours"]
    of_htscodecs = decode / rates["htscodecs"][1] if "htscodecs" in rates else None
    line["decode_of_htscodecs"] = round(of_htscodecs, 2) if of_htscodecs else "htscodecs is not installed"
    line["within_limits"] = (
        8 * works["ours"].size / codes.size <= whole * (1 + MOST_OVERHEAD / 100)
        and encode >= LEAST_ENCODE
        and decode >= LEAST_DECODE
        and (of_htscodecs is None or of_htscodecs >= LEAST_OF_HTSCODECS)
    )
    return line


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--log2-numbers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--families", nargs="+", default=["normal"], choices=FAMILIES)
    parser.add_argument("--bits", nargs="+", type=float, default=[2, 3, 4, 5])
    parser.add_argument("--htscodecs", default=ctypes.util.find_library("htscodecs"), help="file of the library")
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from core.tensors.entropy.machine import has_wide_vectors

    loops = "avx512" if has_wide_vectors() else "portable"
    about = {"benchmark": "entropy_speed", "log2_numbers": given.log2_numbers, "rounds": given.rounds, "loops": loops}
    for family in given.families:
        for bits in given.bits:
            line = report(sample(family, 1 << given.log2_numbers, bits), given.htscodecs, given.rounds)
            print(json.dumps(about | {"family": family} | line), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
