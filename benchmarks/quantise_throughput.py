"""Throughput and peak memory of quantising a synthetic checkpoint without data.

Each measurement is a process of its own: one that only loads what the pipeline loads, one that quantises. Peaks are the
kernel's (VmHWM). Prints JSON lines: MB/s of source bytes, peak above the baseline, and the promise that it is held to:
two largest tensors + 400 MiB.

    python benchmarks/quantise_throughput.py [--mib 1024] [--format int4@128 ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

SLACK_BYTES = 400 << 20
ROOT = Path(__file__).parents[1]
FORMATS = ("int4@128", "t7_4@64:signmax", "float4_e2m1@32:absmax:e8m0")


def synthetic(folder: Path, mib: int) -> int:
    """A bf16 checkpoint of `mib` MiB in layers of a large model's proportions; the bytes of its largest tensor."""
    import torch

    from core.tensors.writer import Part, SafetensorsWriter

    rows, columns = 4096, 8192  # 64 MiB
    table = Part("model.embed_tokens.weight", "BF16", (16_384, 4096))  # 128 MiB
    layers = [
        Part(f"model.layers.{at}.mlp.down_proj.weight", "BF16", (rows, columns))
        for at in range(max(0, (mib << 20) - table.nbytes) // (rows * columns * 2))
    ]
    parts = [table, *layers] if mib >= 128 else [Part("model.layers.0.w", "BF16", (mib * 512, 1024))]
    block = torch.randn(1024, 8192, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    with SafetensorsWriter(folder / "model.safetensors", parts, {"format": "pt"}) as writer:
        for part in parts:
            repeated = block.reshape(-1).repeat(-(-part.nbytes // (2 * block.numel())))[: part.nbytes // 2]
            writer.write(part.name, repeated.reshape(part.shape))
    (folder / "config.json").write_text(json.dumps({"model_type": "synthetic"}))
    return max(part.nbytes for part in parts)


def peak_bytes() -> int:
    """The most memory that this process ever held, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def child(source: str, out: str, text: str) -> None:
    """Load, and quantise when `out` is given; prints seconds and peak as JSON."""
    from core.pipeline.local import run_recipe
    from core.recipe.recipe import load_recipe

    recipe = {
        "version": 1,
        "target": {"bits_per_param": 5.0},
        "format": text,
        "allocation": "uniform",
        "calibration": False,
        "evaluation": False,
    }
    chosen = load_recipe(recipe)
    started = perf_counter()
    report = run_recipe(Path(source), chosen, Path(out), device="cpu") if out else {"summary": {}}
    print(json.dumps({"seconds": perf_counter() - started, "peak_bytes": peak_bytes(), **report["summary"]}))


def measure(source: Path, out: str, text: str) -> dict[str, float]:
    """One child process."""
    command = [sys.executable, __file__, "--child", str(source), out, text]
    answered = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=None)
    result: dict[str, float] = json.loads(answered.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Make the checkpoint, measure each format, print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--mib", type=int, default=1024)
    arguments.add_argument("--format", nargs="+", default=list(FORMATS))
    arguments.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        child(*given.child)
        return
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "source"
        source.mkdir()
        largest = synthetic(source, given.mib)
        size = (source / "model.safetensors").stat().st_size
        for number, text in enumerate(given.format):
            baseline = measure(source, "", text)
            result = measure(source, str(Path(work) / f"out-{number}"), text)
            above = result["peak_bytes"] - baseline["peak_bytes"]
            line = {
                "benchmark": "quantise_throughput",
                "format": text,
                "source_bytes": size,
                "seconds": round(result["seconds"], 3),
                "mb_per_s": round(size / 1e6 / result["seconds"], 2),
                "bits_per_param": result["bits_per_param"],
                "baseline_bytes": baseline["peak_bytes"],
                "above_baseline_bytes": above,
                "largest_tensor_bytes": largest,
                "limit_bytes": 2 * largest + SLACK_BYTES,
                "within_limit": above <= 2 * largest + SLACK_BYTES,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
