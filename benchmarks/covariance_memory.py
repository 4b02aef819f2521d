"""Memory of calibrating with input covariance, against a network that is never held whole.

Each measurement is a process of its own: one that does everything but walk through the network, one that calibrates.
Peaks are the kernel's (VmHWM). Prints JSON lines: the peak above the baseline beside the promise that it is held to:
the largest block in the dtype of the pass, the activations of all windows before and after a block and those that the
pass itself keeps, the block's statistics in fp64, and 500 MiB. `network_bytes` is what holding it would have taken.

    python benchmarks/covariance_memory.py [--checkpoint FOLDER ...] [--layers 4 12] [--sequences 8] [--length 512]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).parents[1]
SLACK_BYTES = 500 << 20
WIDTH, INNER, VOCABULARY, HEADS, KV_HEADS = 2048, 5632, 32_000, 32, 4  # of a Llama of 1.1e9 parameters in 22 layers


def synthetic(folder: Path, layers: int) -> Path:
    """A bf16 Llama of that many layers, random, with the bundled model's tokenizer."""
    import torch

    from core.tensors.writer import Part, SafetensorsWriter
    from models import BUNDLED

    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "lm_head.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(layers):
        at, narrow = f"model.layers.{layer}", WIDTH // HEADS * KV_HEADS
        shapes |= {f"{at}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qo"}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (narrow, WIDTH) for name in "kv"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (WIDTH, INNER)
    folder.mkdir()
    parts = [Part(name, "BF16", shape) for name, shape in shapes.items()]
    with SafetensorsWriter(folder / "model.safetensors", parts, {"format": "pt"}) as writer:
        for seed, part in enumerate(parts):
            chance = torch.Generator().manual_seed(seed)
            values = torch.ones(part.shape) if len(part.shape) == 1 else torch.randn(part.shape, generator=chance) / 45
            writer.write(part.name, values.to(torch.bfloat16))
    config = json.loads((BUNDLED / "config.json").read_text()) | {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH // HEADS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(BUNDLED / "tokenizer.json", folder / "tokenizer.json")
    return folder


def peak_bytes() -> int:
    """The most memory that this process ever held, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def child(source: str, sequences: int, length: int, *, gather: bool) -> None:
    """Do what a calibration does before it walks, and calibrate if told to; prints sizes and peak as JSON."""
    import torch

    from core.hollow import HollowNetwork
    from core.jobs.steps import StepInput, StepRequest
    from core.pipeline.calibrate import calibrate
    from core.pipeline.context import StepContext
    from core.pipeline.fetch import open_checkpoint
    from core.pipeline.forward import windows_of
    from core.pipeline.local import run_steps
    from core.recipe.recipe import load_recipe
    from core.storage.local_store import LocalStore

    spec = {"text": "builtin", "sequences": sequences, "sequence_length": length, "seed": 0}
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "scratch").mkdir()
        ctx = StepContext(store=LocalStore(Path(work) / "store"), scratch=Path(work) / "scratch")
        recipe = load_recipe({"version": 1, "target": {"bits_per_param": 5.0}, "format": "int4@128"})
        fetched = run_steps(Path(source), recipe, ctx, ("fetch",))["fetch"][0]
        index = open_checkpoint(ctx, fetched)
        windows = windows_of(index, spec, "calibration")
        network = HollowNetwork(index, dtype=torch.float32).network
        answer: dict[str, Any] = {"seconds": 0.0, "tokens": windows.ids.numel()} | sizes(network, windows.ids.numel())
        if gather:
            request = StepRequest(
                kind="calibrate",
                input_hash="a" * 64,
                params={"calibration": spec, "gather": ["covariance"]},
                inputs=(StepInput(kind="fetch", output=fetched),),
            )
            started = perf_counter()
            values = calibrate(request, ctx).values["covariance"]
            answer |= {"seconds": perf_counter() - started, "statistics_bytes": statistics_bytes(values["tensors"])}
    print(json.dumps(answer | {"peak_bytes": peak_bytes()}))


def sizes(network: Any, tokens: int) -> dict[str, int]:
    """Bytes in fp32 of the network, its largest block or table, and three sets of activations between blocks."""
    from core.sensitivity.walk import blocks_of

    table = network.get_input_embeddings().weight
    blocks = [sum(one.numel() for one in block.parameters()) for block in blocks_of(network)[0]]
    return {
        "network_bytes": 4 * sum(one.numel() for one in network.parameters()),
        "largest_block_bytes": 4 * max(*blocks, table.numel()),
        "activation_bytes": 3 * 4 * tokens * table.shape[1],
    }


def statistics_bytes(tensors: dict[str, dict[str, Any]]) -> int:
    """Of the block with most: its distinct matrices in fp64. A block has the first number of its names in common."""
    blocks: dict[str, dict[str, int]] = {}
    for one in tensors.values():
        numbers = [at for at, part in enumerate(one["key"].split(".")) if part.isdigit()]
        block = ".".join(one["key"].split(".")[: numbers[0] + 1]) if numbers else one["key"]
        blocks.setdefault(block, {})[one["key"]] = 8 * one["inputs"] ** 2
    return max(sum(one.values()) for one in blocks.values())


def measure(source: Path, given: argparse.Namespace, *, gather: bool) -> dict[str, Any]:
    """One child process."""
    command = [sys.executable, __file__, "--child", str(source), "--sequences", str(given.sequences)]
    command += ["--length", str(given.length), *(["--gather"] if gather else [])]
    answered = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    result: dict[str, Any] = json.loads(answered.stdout.splitlines()[-1])
    return result


def sources(work: Path, given: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """What is measured: the bundled model, synthetic ones, and those that are named."""
    from models import BUNDLED

    yield "bundled", BUNDLED
    for layers in given.layers:
        folder = synthetic(work / f"{layers}", layers)
        yield f"llama of {layers} layers", folder
        shutil.rmtree(folder)
    for folder in given.checkpoint:
        yield folder.name, folder


def main() -> None:
    """Measure each, print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--checkpoint", nargs="*", type=Path, default=[])
    arguments.add_argument("--layers", nargs="*", type=int, default=[4, 12])
    arguments.add_argument("--sequences", type=int, default=8)
    arguments.add_argument("--length", type=int, default=512)
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    arguments.add_argument("--gather", action="store_true", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        child(given.child, given.sequences, given.length, gather=given.gather)
        return
    with tempfile.TemporaryDirectory() as work:
        for name, folder in sources(Path(work), given):
            baseline = measure(folder, given, gather=False)["peak_bytes"]
            result = measure(folder, given, gather=True)
            parts = ("largest_block_bytes", "activation_bytes", "statistics_bytes")
            limit = sum(result[part] for part in parts) + SLACK_BYTES
            above = result["peak_bytes"] - baseline
            line = {
                "benchmark": "covariance_memory",
                "model": name,
                "tokens": result["tokens"],
                "seconds": round(result["seconds"], 2),
                "network_bytes": result["network_bytes"],
                **{part: result[part] for part in parts},
                "baseline_bytes": baseline,
                "above_baseline_bytes": above,
                "limit_bytes": limit,
                "within_limit": above <= limit,
                "within_limit_without_statistics": above <= limit - result["statistics_bytes"],
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
