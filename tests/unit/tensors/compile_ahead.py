"""Compiles what the GPU kernels would run, without a GPU: one JSON line per kernel, format and architecture.

`ptx` says that code came out for the architecture, `flushes` which arithmetic would lose denormals; registers, stack
and spilled bytes are those that the assembler reports. Run it in a process of its own:

    python tests/unit/tensors/compile_ahead.py [--format int4@64 ...] [--capability 80 90]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
FORMATS = ("int4@64", "nf4@64", "t5_4@64:signmax", "mxfp4", "int8@64", "normal4-sym@64:rms", "int3@channel")
ALIGNMENT = 16
_POINTERS = {
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


def launches(text: str, shape: tuple[int, int]) -> Iterator[tuple[str, object]]:
    """What encoding and decoding a bf16 tensor of that shape would launch."""
    from core.formats.elements import element_table, shared_weights
    from core.formats.stored import packed_bytes, scale_dtype, scale_shape
    from core.recipe.tensor_format import parse
    from core.tensors.blocks import BlockGrid
    from core.tensors.dtypes import TORCH_DTYPES
    from core.tensors.kernels.gpu_launch import Encoding, decoding
    from core.tensors.kernels.gpu_plan import Element, Geometry, ScaleRounding

    fmt = parse(text)
    table = element_table(fmt, shared_weights(fmt, shape))
    grid = BlockGrid.of(fmt, shape)
    geometry = Geometry.of(grid)
    flat = torch.empty(shape[0] * shape[1], dtype=torch.bfloat16)
    work, rounding = Encoding(flat, fmt, geometry, Element.of(fmt, table)), ScaleRounding.of(fmt, table)
    codes = torch.empty(packed_bytes(fmt.codes, flat.numel()), dtype=torch.uint8)
    scales = torch.empty(scale_shape(fmt, shape), dtype=TORCH_DTYPES[scale_dtype(fmt)]).reshape(-1)
    factors, damaged = torch.empty(geometry.blocks), torch.empty(1, dtype=torch.int32)
    if geometry.chunks == 1:
        yield text, work.whole(rounding, codes, scales, damaged)
    else:
        yield text, work.scales(rounding, scales, factors, damaged)
        yield text, work.codes(factors, codes)
    yield text, decoding(fmt, Geometry.for_decoding(grid), codes, scales, torch.empty(fmt.codes), flat)


def compiled(launch: object, capability: int) -> dict[str, object]:
    """One launch, compiled as its arguments would have it specialised."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from core.tensors.kernels import gpu_decode, gpu_encode
    from core.tensors.kernels.gpu_launch import Launch

    assert isinstance(launch, Launch)
    kernel = getattr(gpu_encode, launch.kernel, None) or getattr(gpu_decode, launch.kernel)
    signature, constants, attributes = specialised(kernel.arg_names, launch.arguments)
    signature |= dict.fromkeys(launch.constants, "constexpr")
    source = ASTSource(kernel, signature, constants | dict(launch.constants), attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps})
    ptx, cubin = built.asm["ptx"], built.asm["cubin"]
    return {
        "kernel": launch.kernel,
        "capability": capability,
        "warps": launch.warps,
        "ptx": f".target sm_{capability}" in ptx,
        "flushes": sorted(set(re.findall(r"\b(?:mul|add|sub|fma|div|cvt\.rn)\S*\.ftz\S*", ptx))),
        "approximates": sorted(set(re.findall(r"\b\S+\.approx\S*", ptx))),
        "vectors": sorted(set(re.findall(r"\b(?:ld|st)\.global\S*\.v[248]\.\S+", ptx))),
        "cubin_bytes": len(cubin),
        **resources(cubin),
    }


def specialised(
    names: list[str], arguments: tuple[torch.Tensor | int | float, ...]
) -> tuple[dict[str, str], dict[str, int], dict[tuple[int], list[list[object]]]]:
    """Signature, integers of value 1 as constants, and which pointers and integers are multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for at, (name, given) in enumerate(zip(names, arguments, strict=False)):
        if isinstance(given, torch.Tensor):
            signature[name] = _POINTERS[given.dtype]
        elif isinstance(given, float):
            signature[name] = "fp32"
        elif given == 1:
            signature[name], constants[name] = "constexpr", given
        else:
            signature[name] = "i32"
        if isinstance(given, torch.Tensor) or (signature[name] == "i32" and given % ALIGNMENT == 0):
            attributes[(at,)] = [["tt.divisibility", ALIGNMENT]]
    return signature, constants, attributes


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of stack, local and shared memory."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", shown)}
    return {
        "registers": found["REG"],
        "stack_bytes": found["STACK"],
        "local_bytes": found["LOCAL"],
        "shared_bytes": found["SHARED"],
    }


def main() -> None:
    """Compile and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--format", nargs="+", default=list(FORMATS))
    arguments.add_argument("--capability", nargs="+", type=int, default=[80, 90])
    arguments.add_argument("--columns", type=int, default=32_768)
    given = arguments.parse_args()
    for text in given.format:
        for name, launch in launches(text, (64, given.columns)):
            for capability in given.capability:
                sys.stdout.write(json.dumps({"format": name, **compiled(launch, capability)}) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
