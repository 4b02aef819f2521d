"""Encoding and decoding on a GPU beside a copy from device memory to device memory.

Copy, encode and decode take turns within each round, each timed by device events over a tensor that no cache holds. A
rate is the bytes that must be read and written (weights, codes, scales) per second; the goal is 0.7 of the copy's. Each
format is compared with the reference on the CPU first. JSON lines: one per format, also appended to
benchmarks/results/<device>.jsonl. Without a GPU it says so and ends.

    python benchmarks/encode_speed_gpu.py [--rows 16384] [--columns 8192] [--rounds 30] [--format int4@64 ...]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GOAL = 0.7
WARM_UP = 3
CHECKED_ROWS = 64
FORMATS = (
    "int4@64",
    "nf4@64",
    "t7_4@64:signmax",
    "normal4-sym@64:rms",
    "float4_e2m1@32:absmax:e8m0",
    "int3@128",
    "int8@64",
    "int4@channel",
)


def equals_reference(text: str, weight: torch.Tensor) -> bool:
    """Whether codes, scales and decoded values of a few rows are those of the reference on the CPU."""
    from core.formats.elements import element_table, shared_weights
    from core.recipe.tensor_format import parse
    from core.tensors.encoded import EncodedTensor
    from core.tensors.kernels import gpu
    from core.tensors.nearest import encode_nearest

    fmt, shape = parse(text), tuple(weight.shape)
    expected = encode_nearest(weight.cpu(), fmt)
    found = gpu.encode(weight, fmt, element_table(fmt, shared_weights(fmt, shape)))
    on_device = {name: part.to(weight.device) for name, part in expected.parts().items()}
    decoded = gpu.decode(EncodedTensor(fmt, shape, "BF16", on_device), torch.bfloat16)
    if found is None or decoded is None:
        return False
    return (
        torch.equal(found.codes.cpu(), expected.codes)
        and torch.equal(found.scales.cpu(), expected.scales)
        and torch.equal(decoded.cpu(), expected.decode().reshape(-1).to(torch.bfloat16))
    )


def measure(text: str, weight: torch.Tensor, rounds: int) -> dict[str, object]:
    """Medians of one format."""
    from benchmarks.device_time import milliseconds
    from core.formats.elements import element_table, shared_weights
    from core.recipe.tensor_format import parse
    from core.tensors.encoded import EncodedTensor
    from core.tensors.kernels import gpu

    fmt, shape = parse(text), tuple(weight.shape)
    table = element_table(fmt, shared_weights(fmt, shape))
    found = gpu.encode(weight, fmt, table)
    if found is None:
        return {"benchmark": "encode_speed_gpu", "format": text, "taken": False}
    parts = {"codes": found.codes, "scales": found.scales}
    if fmt.is_codebook:
        parts["codebook"] = torch.tensor(table.values, dtype=torch.float32, device=weight.device)
    encoded, target = EncodedTensor(fmt, shape, "BF16", parts), torch.empty_like(weight)
    works: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(weight),
        "encode": lambda: gpu.encode(weight, fmt, table),
        "decode": lambda: gpu.decode(encoded, torch.bfloat16),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + WARM_UP):
        for name, work in works.items():
            times[name].append(milliseconds(work))
    medians = {name: statistics.median(found[WARM_UP:]) for name, found in times.items()}
    return described(text, weight, encoded.nbytes, medians) | {"equal": equals_reference(text, weight[:CHECKED_ROWS])}


def described(text: str, weight: torch.Tensor, stored: int, medians: dict[str, float]) -> dict[str, object]:
    """Bytes per second and their ratio to the copy's."""
    source = weight.numel() * weight.element_size()
    moved = {"copy": 2 * source, "encode": source + stored, "decode": source + stored}
    rates = {name: moved[name] / (medians[name] * 1e-3) for name in medians}
    return {
        "benchmark": "encode_speed_gpu",
        "device": torch.cuda.get_device_name(weight.device),
        "format": text,
        "shape": list(weight.shape),
        "milliseconds": {name: round(value, 4) for name, value in medians.items()},
        "gb_per_s": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
        "encode_ratio": round(rates["encode"] / rates["copy"], 3),
        "decode_ratio": round(rates["decode"] / rates["copy"], 3),
        "goal": GOAL,
    }


def main() -> None:
    """Measure, print, append."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rows", type=int, default=16_384)
    arguments.add_argument("--columns", type=int, default=8192)
    arguments.add_argument("--rounds", type=int, default=30)
    arguments.add_argument("--format", nargs="+", default=list(FORMATS))
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"benchmark": "encode_speed_gpu", "skipped": "no CUDA device"}))
        return
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn((given.rows, given.columns), generator=generator, device="cuda").mul_(0.02).to(torch.bfloat16)
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as results:
        for text in given.format:
            line = json.dumps(measure(text, weight, given.rounds))
            print(line, flush=True)
            results.write(line + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
