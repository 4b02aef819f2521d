"""The GPU kernels of successive rounding: what they compile to, and on a GPU how fast they are beside the CPU's loops.

Compiled ahead of time, without a GPU, for sm_80 and sm_90: registers, bytes of local and shared memory, and from the
machine code (SASS, disassembled) of the innermost loop, in which columns take up what those before them left over, the
instructions and the loads for each multiplication and addition of a warp; whether the code holds an inexact division.
On a GPU rounding, the product of the weights with the factor that precedes it, and on one thread of the CPU the
compiled loop, take turns within each round; times are medians, in milliseconds, and as multiples of that product's.
Codes are compared with the CPU's first. JSON lines.

    python benchmarks/rounding_gpu.py [--columns 4096] [--rows 4096] [--rounds 5] [--only-compile]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from core.rounding.gpu_successive import ColumnsLaunch
    from core.rounding.levels import Levels

ROOT = Path(__file__).parents[1]
NAME = "rounding_gpu"
ALIGNMENT = 16
WIDTH = 128
CORRELATION = 0.9
_POINTERS = {torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32", torch.float64: "*fp64"}


def table(levels: int, kind: int, rows: int, columns: int) -> Levels:
    """Levels at equal distances, a scale for WIDTH columns of a row."""
    from core.rounding.levels import Levels

    values = np.arange(levels, dtype=np.float32) - levels / 2
    return Levels(
        values=values.astype(np.float32),
        limits=((values[1:] + values[:-1]) / 2).astype(np.float64),
        upper_on_tie=np.zeros(levels - 1, np.bool_),
        kind=kind,
        zero=levels // 2,
        scales=np.full((rows, -(-columns // WIDTH)), 4 / levels, np.float32),
        blocks=np.arange(columns) // WIDTH,
    )


def launches(rows: int, columns: int) -> Iterator[tuple[str, ColumnsLaunch]]:
    """What rounding a matrix of that shape would launch for a block of columns."""
    from core.rounding.gpu_successive import BLOCK, TOGETHER_ROWS, Spreading, Stepping
    from core.rounding.levels import EXACT, QUOTIENTS, ROUNDED
    from core.rounding.successive import Scales

    extent, ones = (columns - BLOCK, columns), np.ones(columns)
    for dtype, name in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        targets, factor = torch.empty(columns, rows, dtype=dtype), torch.empty(columns, columns, dtype=dtype)
        given = (factor, ones, Scales.ones(rows, columns))
        yield f"numbers, {name}", Stepping.of(targets, *given, ones).launch(*extent)
        few = targets[:, :TOGETHER_ROWS]
        given = (factor, ones, Scales.ones(few.shape[1], columns))
        yield f"numbers and gains, {name}", Stepping.of(few, *given, None).launch(*extent)
    wanted, ratios = torch.empty(columns, rows, dtype=torch.float64), torch.empty(columns, columns, dtype=torch.float64)
    for kind, count, name in ((EXACT, 16, "exact"), (ROUNDED, 16, "rounded"), (QUOTIENTS, 15, "quotients")):
        levels = table(count, kind, rows, columns)
        yield f"{count} levels, {name}", Spreading.of(wanted, wanted, ratios, levels).launch(0, BLOCK)
    levels = table(256, EXACT, rows, columns)
    yield "256 levels, exact", Spreading.of(wanted, wanted, ratios, levels).launch(0, BLOCK)


def compiled(name: str, launch: ColumnsLaunch, capability: int) -> dict[str, object]:
    """A launch as machine code, described."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from core.rounding import gpu_successive_kernel

    kernel = getattr(gpu_successive_kernel, launch.kernel)
    signature, attributes = specialised(kernel, launch.arguments)
    signature |= dict.fromkeys(launch.constants, "constexpr")
    source = ASTSource(kernel, signature, dict(launch.constants), attributes)
    target = GPUTarget("cuda", capability, 32)
    found = triton.compile(source, target=target, options={"num_warps": launch.warps})
    listing = shown([knobs.nvidia.nvdisasm.path, "-c"], found.asm["cubin"])
    usage = shown([knobs.nvidia.cuobjdump.path, "--dump-resource-usage"], found.asm["cubin"])
    numbers = {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "benchmark": NAME,
        "architecture": f"sm_{capability}",
        "code": "SASS",
        "kernel": name,
        "warps": launch.warps,
        **innermost(listing),
        "registers": numbers["REG"],
        "local_bytes": numbers["LOCAL"] + numbers["STACK"],
        "inexact": sorted(set(re.findall(r"\b\S+\.(?:approx|ftz)\S*|\bdiv\.full\S*", found.asm["ptx"]))),
    }


def specialised(
    kernel: Any, arguments: tuple[torch.Tensor | int | float, ...]
) -> tuple[dict[str, str], dict[tuple[int], list[list[object]]]]:
    """Signature, and which pointers and integers are known to be multiples of 16."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for at, (parameter, given) in enumerate(zip(kernel.params, arguments, strict=False)):
        is_tensor = isinstance(given, torch.Tensor)
        signature[parameter.name] = _POINTERS[given.dtype] if isinstance(given, torch.Tensor) else "i32"
        if is_tensor or (given % ALIGNMENT == 0 and not parameter.do_not_specialize):
            attributes[at,] = [["tt.divisibility", ALIGNMENT]]
    return signature, attributes


def shown(command: list[str], cubin: bytes) -> str:
    """What a tool prints about machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def innermost(listing: str) -> dict[str, object]:
    """Of the loop without a loop in it that adds most products: instructions and loads for each of them."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    jumps = [(at, re.search(r"\bBRA.* `\((\.L_x_\d+)\)", text)) for at, text in enumerate(code)]
    loops = [(labels[jump[1]], at) for at, jump in jumps if jump and labels.get(jump[1], at) < at]
    bare = [one for one in loops if not any(one[0] <= other[0] and other[1] < one[1] for other in loops)]
    bodies = [code[begin : end + 1] for begin, end in bare]
    body = max(bodies, key=lambda lines: sum(bool(re.search(r"\b[DF]FMA\b", text)) for text in lines))
    products = sum(bool(re.search(r"\b[DF]FMA\b", text)) for text in body)
    loads = sum("LDG" in text for text in body)
    return {
        "products_in_loop": products,
        "instructions_per_product": round(len(body) / products, 2),
        "loads_per_product": round(loads / products, 2),
    }


def layer(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal weights W (rows, columns), the factor of autoregressive inputs, and Y^T, on the GPU."""
    places = torch.arange(columns, dtype=torch.float64, device="cuda")
    factor = torch.linalg.cholesky(CORRELATION ** (places[:, None] - places).abs())
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn((rows, columns), generator=generator, device="cuda", dtype=torch.float64)
    return weight.to(dtype), factor.to(dtype), (factor.T @ weight.T).to(dtype)


def works(
    rows: int, columns: int, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], object]], Callable[[], object], float]:
    """What takes turns on the GPU, the loop on the CPU, and which share of the numbers differs between the two."""
    from core.rounding.gpu_successive import round_to_steps as on_gpu
    from core.rounding.successive import Scales, round_to_steps

    weight, factor, targets = layer(rows, columns, dtype)
    steps, gains = 0.5 / factor.diagonal().double().cpu().numpy(), np.ones(columns)
    given = (steps, Scales.ones(rows, columns), gains)
    here, on_cpu = targets.cpu(), factor.cpu()
    found, expected = on_gpu(targets.clone(), factor, *given), round_to_steps(here.clone(), on_cpu, *given)
    if found is None:
        raise SystemExit("the kernels do not take it")
    turns: dict[str, Callable[[], object]] = {
        "product": lambda: torch.mm(factor.T, weight.T),
        "rounding": lambda: on_gpu(targets.clone(), factor, *given),
    }
    differ = float(np.mean(found.numbers != expected.numbers))
    return turns, lambda: round_to_steps(here.clone(), on_cpu, *given), differ


def measure(rows: int, columns: int, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """Medians of works that take turns."""
    from benchmarks.device_time import milliseconds

    turns, on_cpu, differ = works(rows, columns, dtype)
    times: dict[str, list[float]] = {name: [] for name in (*turns, "cpu")}
    torch.set_num_threads(1)
    for _ in range(rounds):
        for name, work in turns.items():
            times[name].append(milliseconds(work))
        begin = time.process_time()
        on_cpu()
        times["cpu"].append(1e3 * (time.process_time() - begin))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "benchmark": NAME,
        "device": torch.cuda.get_device_name(),
        "shape": [rows, columns],
        "dtype": str(dtype),
        "milliseconds": {name: round(value, 3) for name, value in medians.items()},
        "per_product": {name: round(value / medians["product"], 2) for name, value in medians.items()},
        "share_of_numbers_that_differ": differ,
    }


def main() -> None:
    """Compile, measure, print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rows", type=int, default=4096)
    arguments.add_argument("--columns", type=int, default=4096)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--capability", type=int, nargs="+", default=[80, 90])
    arguments.add_argument("--kernel", nargs="+", default=[""], help="compile only what is named with one of these")
    arguments.add_argument("--only-compile", action="store_true")
    given = arguments.parse_args()
    for name, launch in launches(given.rows, given.columns):
        for capability in given.capability:
            if any(part in name for part in given.kernel):
                print(json.dumps(compiled(name, launch, capability)), flush=True)
    if given.only_compile:
        return
    if not torch.cuda.is_available():
        print(json.dumps({"benchmark": NAME, "skipped": "times", "reason": "no CUDA device"}))
        return
    for dtype in (torch.float32, torch.float64):
        print(json.dumps(measure(given.rows, given.columns, dtype, given.rounds)), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
