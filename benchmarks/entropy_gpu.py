"""The GPU kernel that decodes entropy-coded numbers: what it compiles to, and on a GPU how fast it is beside a copy.

Compiled ahead of time, without a GPU, for sm_90: instructions of the machine code (SASS, disassembled) in the innermost
loop for each step of 32 numbers, how many of these go to memory, registers and bytes of shared and local memory; with
the vote in PTX and with a portable sum. On a GPU a copy from device memory to device memory, decoding to numbers and to
bf16 values, and nvCOMP's ANS of the same numbers as bytes, where it can be imported, take turns within each round;
rates are numbers per second and the bytes written per second as a share of the copy's. JSON lines.

    python benchmarks/entropy_gpu.py [--numbers 26] [--rounds 30] [--stream-bits 16 18 20]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from core.tensors.entropy.decoder import CodedSequence
    from core.tensors.kernels.gpu_entropy import StreamsLaunch

ROOT = Path(__file__).parents[1]
NAME = "entropy_gpu"
ARCHITECTURE = 90
ALIGNMENT = 16
WARM_UP = 3
STD = 3.862  # of a Normal variable whose integers have 4 bits of entropy
COLUMNS, WIDTH = 4096, 64
_POINTERS = {
    torch.int8: "*i8",
    torch.uint16: "*u16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
}


def coded(count: int, stream_bits: int) -> CodedSequence:
    """Rounded Normal numbers."""
    from core.tensors.entropy.coder import encode_segments
    from core.tensors.entropy.decoder import CodedSequence
    from core.tensors.entropy.layout import Segment
    from core.tensors.entropy.windows import histogram_model

    codes = np.rint(np.random.default_rng(0).standard_normal(count, np.float32) * STD).astype(np.int8)
    data = encode_segments(codes, [histogram_model(codes)], [Segment(0, count)], 32, stream_bits)
    return CodedSequence.parse(data, count)


def launches(*, is_inline: bool) -> Iterator[tuple[str, StreamsLaunch]]:
    """What decoding a matrix of 64 rows would launch, for numbers and for values in blocks of several kinds."""
    from core.tensors.kernels import gpu_entropy as gpu

    count = 64 * COLUMNS
    sequence, device = coded(count, 16), torch.device("cpu")
    streams = range(len(sequence.places))
    for dtype in gpu.NUMBERS:
        out = torch.empty(count, dtype=dtype)
        target = gpu.Target.numbers(out)
        records = gpu.number_records(sequence.models, out)
        yield str(dtype), gpu.launch_of(sequence, streams, 0, records, target, is_inline=is_inline)[0]
    records = gpu.value_records(sequence.models, torch.arange(-64.0, 64.0), -64)
    order = torch.arange(COLUMNS, dtype=torch.int32, device=device)
    for name, columns, width, line_order in (
        ("one factor", COLUMNS, 0, None),
        (f"blocks of {WIDTH}", COLUMNS, WIDTH, None),
        ("rows of 3000", 3000, 3000, None),
        (f"ragged blocks of {WIDTH}", 4000, WIDTH, None),
        ("columns in order", COLUMNS, WIDTH, order),
    ):
        factors = torch.ones(count // width if width else 1)
        for dtype in gpu.VALUES:
            target = gpu.Target(torch.empty(count, dtype=dtype), factors, columns, width or columns, line_order, 1)
            launch = gpu.launch_of(sequence, streams, 0, records, target, is_inline=is_inline)[0]
            yield f"{dtype}, {name}", launch


def compiled(name: str, launch: StreamsLaunch) -> dict[str, object]:
    """A launch as machine code, described."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from core.tensors.kernels.gpu_entropy_kernel import streams_kernel

    signature, constants, attributes = specialised(streams_kernel.arg_names, launch.arguments)
    signature |= dict.fromkeys(launch.constants, "constexpr")
    source = ASTSource(streams_kernel, signature, constants | dict(launch.constants), attributes)
    target = GPUTarget("cuda", ARCHITECTURE, 32)
    cubin = triton.compile(source, target=target, options={"num_warps": launch.warps}).asm["cubin"]
    listing = shown([knobs.nvidia.nvdisasm.path, "-c"], cubin)
    usage = shown([knobs.nvidia.cuobjdump.path, "--dump-resource-usage"], cubin)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    return {
        "benchmark": NAME,
        "architecture": f"sm_{ARCHITECTURE}",
        "code": "SASS",
        "out": name,
        "vote": "ptx" if launch.constants["INLINE"] else "portable",
        **innermost(listing),
        "registers": int(found["REG"]),
        "shared_bytes": int(found["SHARED"]),
        "local_bytes": int(found["LOCAL"]) + int(found["STACK"]),
    }


def specialised(
    names: list[str], arguments: tuple[torch.Tensor | int | float, ...]
) -> tuple[dict[str, str], dict[str, int | float], dict[tuple[int], list[list[object]]]]:
    """Signature, integers of value 1 as constants, and which pointers and integers are multiples of 16."""
    signature: dict[str, str] = {}
    constants: dict[str, int | float] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for at, (name, given) in enumerate(zip(names, arguments, strict=False)):
        if isinstance(given, torch.Tensor):
            signature[name] = _POINTERS[given.dtype]
        elif given == 1:
            signature[name], constants[name] = "constexpr", given
        else:
            signature[name] = "i32"
        if isinstance(given, torch.Tensor) or (signature[name] == "i32" and given % ALIGNMENT == 0):
            attributes[at,] = [["tt.divisibility", ALIGNMENT]]
    return signature, constants, attributes


def shown(command: list[str], cubin: bytes) -> str:
    """What a tool prints about machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def innermost(listing: str) -> dict[str, object]:
    """Of the longest loop without a loop in it: steps, which are its loads of 8 bytes, and instructions of a step."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    jumps = [(at, re.search(r"\bBRA `\((\.L_x_\d+)\)", text)) for at, text in enumerate(code)]
    loops = [(labels[jump[1]], at) for at, jump in jumps if jump and labels[jump[1]] < at]
    bare = [one for one in loops if not any(one[0] <= other[0] and other[1] < one[1] for other in loops)]
    begin, end = max(bare, key=lambda loop: loop[1] - loop[0])
    body = code[begin : end + 1]
    steps = sum("LDG.E.64" in text for text in body)
    memory = sum(bool(re.search(r"\b(?:LD|ST|CCTL|ATOM)", text)) for text in body)
    return {
        "steps_in_loop": steps,
        "instructions_per_step": round(len(body) / steps, 2),
        "memory_instructions_per_step": round(memory / steps, 2),
    }


def works(sequence: CodedSequence) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """What takes turns, and how many bytes each writes; both results are compared with the CPU's first."""
    from core.tensors.kernels import gpu_entropy as gpu

    device, count = torch.device("cuda"), sequence.count
    streams, expected = range(len(sequence.places)), np.empty(count, np.int16)
    sequence.decode(expected)
    numbers, values = (torch.empty(count, dtype=dtype, device=device) for dtype in (torch.int16, torch.bfloat16))
    table, factors = torch.arange(-64.0, 64.0, device=device), torch.ones(count // WIDTH, device=device)
    number_target = gpu.Target.numbers(numbers)
    value_target = gpu.Target(values, factors, COLUMNS, WIDTH)
    found: dict[str, Callable[[], object]] = {}
    source = torch.empty_like(values)
    found["copy"] = lambda: source.copy_(values)
    ready = {
        "int16": (number_target, gpu.number_records(sequence.models, numbers)),
        "bf16": (value_target, gpu.value_records(sequence.models, table, -64)),
    }
    for name, (target, records) in ready.items():
        for is_inline in (True, False):
            launch = gpu.launch_of(sequence, streams, 0, records, target, is_inline=is_inline)[0]
            launch.run()
            if not np.array_equal(target.out.cpu().float().numpy(), expected):
                raise SystemExit(f"{name} differs from the CPU's")
            found[name if is_inline else f"{name}, portable"] = launch.run
    sizes = dict.fromkeys(found, count * 2)
    if ans := nvcomp_ans(expected.astype(np.int8), device):
        found["nvcomp ans"], sizes["nvcomp ans"] = ans, count
    return found, sizes


def nvcomp_ans(codes: np.ndarray[Any, np.dtype[np.int8]], device: torch.device) -> Callable[[], object] | None:
    """nvCOMP's decoder of the same numbers as bytes; None where it is not installed."""
    try:
        nvcomp = import_module("nvidia.nvcomp")
    except ImportError:
        print(json.dumps({"benchmark": NAME, "skipped": "nvcomp ans", "reason": "nvidia.nvcomp is not installed"}))
        return None
    codec = nvcomp.Codec(algorithm="ANS", cuda_stream=torch.cuda.current_stream(device).cuda_stream)
    packed = codec.encode(nvcomp.as_array(torch.from_numpy(codes).to(device)))
    return lambda: codec.decode(packed)


def measure(sequence: CodedSequence, stream_bits: int, rounds: int) -> dict[str, object]:
    """Medians of works that take turns."""
    from benchmarks.device_time import milliseconds

    found, sizes = works(sequence)
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds + WARM_UP):
        for name, work in found.items():
            times[name].append(milliseconds(work))
    medians = {name: statistics.median(taken[WARM_UP:]) for name, taken in times.items()}
    copied = sizes["copy"] / medians["copy"]
    return {
        "benchmark": NAME,
        "device": torch.cuda.get_device_name(),
        "numbers": sequence.count,
        "stream_bits": stream_bits,
        "streams": len(sequence.places),
        "bits_per_number": round(8 * sequence.data.size / sequence.count, 3),
        "milliseconds": {name: round(value, 4) for name, value in medians.items()},
        "numbers_per_second": {name: round(sequence.count / (value * 1e-3)) for name, value in medians.items()},
        "written_share_of_copy": {name: round(sizes[name] / medians[name] / copied, 4) for name in medians},
    }


def main() -> None:
    """Compile, measure, print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--numbers", type=int, default=26, help="log2 of how many are decoded")
    arguments.add_argument("--rounds", type=int, default=30)
    arguments.add_argument("--stream-bits", type=int, nargs="+", default=[16, 18, 20])
    arguments.add_argument("--out", nargs="+", default=[""], help="compile only what is named with one of these")
    arguments.add_argument("--only-compile", action="store_true")
    given = arguments.parse_args()
    for is_inline in (True, False):
        for name, launch in launches(is_inline=is_inline):
            if any(part in name for part in given.out):
                print(json.dumps(compiled(name, launch)), flush=True)
    if given.only_compile:
        return
    if not torch.cuda.is_available():
        print(json.dumps({"benchmark": NAME, "skipped": "times", "reason": "no CUDA device"}))
        return
    for stream_bits in given.stream_bits:
        print(json.dumps(measure(coded(1 << given.numbers, stream_bits), stream_bits, given.rounds)), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
