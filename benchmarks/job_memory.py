"""Memory of a whole job, step by step, against a network that is never held whole.

Every step is a process of its own, as with a worker whose engine is fresh; peaks are the kernel's (VmHWM), above that
of an idle process which has imported the same things and holds the network without weights. Prints a JSON line per
step, beside the promise: the largest block in the dtype of the pass, its activations, and 500 MiB. Activations are
three sets for all windows between blocks, and the logits of one sequence with their gradient. `statistics_bytes` is
what covariances of one block's inputs take in fp64 while they are gathered; it is not part of the promise, only told.
`network_bytes` is what holding the network would have taken. Models: the bundled one, one with the shape of
SmolLM2-135M and random weights (its text comes from the bundled tokenizer), and the folders that are named.

    python benchmarks/job_memory.py [--checkpoint FOLDER ...] [--sequences 8] [--length 512] [--rounding gptq]
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
IDLE = "idle"
STEPS = ("fetch", "calibrate", "allocate", "quantise", "assemble", "evaluate", "export")
FORMATS = {"gptq": "int4@128", "watersic": "grid4@tensor", "error_diffusion": "mxint4"}
SMOLLM2 = {  # SmolLM2-135M's own config
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rope_theta": 100000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}


def of_smollm2_shape(folder: Path) -> Path:
    """A random bf16 checkpoint of SmolLM2-135M's shape, with the bundled model's tokenizer."""
    import torch

    from core.tensors.writer import Part, SafetensorsWriter
    from models import BUNDLED

    width, inner, heads, kv_heads, head = (
        int(str(SMOLLM2[key]))
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (int(str(SMOLLM2["vocab_size"])), width),
        "model.norm.weight": (width,),
    }
    for layer in range(int(str(SMOLLM2["num_hidden_layers"]))):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.q_proj.weight": (heads * head, width)}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (kv_heads * head, width) for name in "kv"}
        shapes |= {f"{at}.self_attn.o_proj.weight": (width, heads * head)}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (width, inner)}
    folder.mkdir()
    parts = [Part(name, "BF16", shape) for name, shape in shapes.items()]
    with SafetensorsWriter(folder / "model.safetensors", parts, {"format": "pt"}) as writer:
        for seed, part in enumerate(parts):
            chance = torch.Generator().manual_seed(seed)
            spread = part.shape[-1] ** -0.5
            values = (
                torch.ones(part.shape) if len(part.shape) == 1 else torch.randn(part.shape, generator=chance) * spread
            )
            writer.write(part.name, values.to(torch.bfloat16))
    config = json.loads((BUNDLED / "config.json").read_text()) | SMOLLM2
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(BUNDLED / "tokenizer.json", folder / "tokenizer.json")
    return folder


def recipe_of(given: argparse.Namespace) -> Any:
    """A job with every step: Fisher information and covariances, allocation by both, and an evaluation."""
    from core.recipe.recipe import load_recipe

    text = {"text": "builtin", "sequences": given.sequences, "sequence_length": given.length}
    return load_recipe(
        {
            "version": 1,
            "target": {"bits_per_param": given.bits},
            "format": FORMATS.get(given.rounding, "int4@128"),
            "rounding": {"name": given.rounding},
            "calibration": text | {"seed": 0},
            "evaluation": text,
        }
    )


def peak_bytes() -> int:
    """The most memory that this process ever held, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def child(kind: str, source: Path, work: Path, given: argparse.Namespace) -> None:
    """Import, and execute one step with what earlier ones left in `work`; prints seconds and the peak as JSON."""
    import torch

    from core.hollow import HollowNetwork
    from core.pipeline import steps
    from core.pipeline.context import StepContext
    from core.pipeline.local import open_folder
    from core.storage.local_store import LocalStore

    torch.set_num_threads(given.threads)
    answer: dict[str, Any] = sizes(HollowNetwork(open_folder(source), dtype=torch.float32).network, given)
    if kind != IDLE:
        scratch = work / "scratch" / kind
        scratch.mkdir(parents=True)
        ctx = StepContext(store=LocalStore(work / "store"), scratch=scratch)
        request = request_of(kind, source, work, given)
        started = perf_counter()
        output = steps.run_step(kind, request, ctx)
        answer["seconds"] = round(perf_counter() - started, 2)
        (work / f"{kind}.json").write_text(json.dumps(output))
        if kind == "calibrate":
            answer["statistics_bytes"] = statistics_bytes(output["values"]["covariance"]["tensors"])
    print(json.dumps(answer | {"peak_bytes": peak_bytes()}))


def request_of(kind: Any, source: Path, work: Path, given: argparse.Namespace) -> Any:
    """The request of a step after those whose outputs lie in `work`."""
    from core.jobs import steps
    from core.jobs.steps import StepInput, StepOutput, StepRequest

    recipe = recipe_of(given).canonical()
    inputs = tuple(
        StepInput(kind=needed, output=StepOutput.model_validate_json((work / f"{needed}.json").read_text()))
        for needed in steps.dependencies_of(kind, recipe)
    )
    params = steps.recipe_params(kind, recipe)
    if kind == "fetch":
        params = {"source": {"kind": "path", "path": str(source), "in_place": True}}
    seed = steps.step_seed(kind, recipe)
    name = steps.input_hash(kind, params, [steps.output_hash(one.output) for one in inputs], seed=seed)
    return StepRequest(kind=kind, input_hash=name, params=params, inputs=inputs, seed=seed)


def sizes(network: Any, given: argparse.Namespace) -> dict[str, int]:
    """Bytes in fp32 of the network, its largest block or table, and activations as they are promised."""
    from core.sensitivity.walk import blocks_of

    table, tokens = network.get_input_embeddings().weight, given.sequences * given.length
    blocks = [sum(one.numel() for one in block.parameters()) for block in blocks_of(network)[0]]
    return {
        "network_bytes": 4 * sum(one.numel() for one in network.parameters()),
        "largest_block_bytes": 4 * max(*blocks, table.numel()),
        "activation_bytes": 3 * 4 * tokens * table.shape[1] + 2 * 4 * given.length * table.shape[0],
    }


def statistics_bytes(tensors: dict[str, dict[str, Any]]) -> int:
    """Of the block with most: its distinct matrices in fp64. A block has the first number of its names in common."""
    blocks: dict[str, dict[str, int]] = {}
    for one in tensors.values():
        numbers = [at for at, part in enumerate(one["key"].split(".")) if part.isdigit()]
        block = ".".join(one["key"].split(".")[: numbers[0] + 1]) if numbers else one["key"]
        blocks.setdefault(block, {})[one["key"]] = 8 * one["inputs"] ** 2
    return max(sum(one.values()) for one in blocks.values())


def measure(kind: str, source: Path, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One child process."""
    command = [sys.executable, __file__, "--child", kind, "--source", str(source), "--work", str(work)]
    for name in ("sequences", "length", "threads", "rounding", "bits"):
        command += [f"--{name}", str(getattr(given, name))]
    answered = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    result: dict[str, Any] = json.loads(answered.stdout.splitlines()[-1])
    return result


def sources(work: Path, given: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """What is measured: the bundled model, one of SmolLM2-135M's shape, and those that are named."""
    from models import BUNDLED

    yield "bundled", BUNDLED
    yield "SmolLM2-135M's shape, random weights", of_smollm2_shape(work / "smollm2_shape")
    for folder in given.checkpoint:
        yield folder.name, folder.resolve()


def main() -> None:
    """Measure each, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", nargs="*", type=Path, default=[])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounding", default="gptq")
    parser.add_argument("--bits", type=float, default=4.5)
    for hidden in ("--child", "--source", "--work"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, Path(given.source), Path(given.work), given)
        return
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, source) in enumerate(sources(Path(folder), given)):
            work = Path(folder) / f"{number}"
            work.mkdir()
            print_steps(name, source, work, given)
            shutil.rmtree(work)


def print_steps(name: str, source: Path, work: Path, given: argparse.Namespace) -> None:
    """A line for each step of a job on one checkpoint."""
    about = {"benchmark": "job_memory", "model": name, "tokens": given.sequences * given.length}
    baseline = measure(IDLE, source, work, given)["peak_bytes"]
    for kind in STEPS:
        result = measure(kind, source, work, given)
        limit = result["largest_block_bytes"] + result["activation_bytes"] + SLACK_BYTES
        above = result.pop("peak_bytes") - baseline
        line = {"baseline_bytes": baseline, "above_baseline_bytes": above, "limit_bytes": limit}
        print(json.dumps(about | {"step": kind} | result | line | {"within_limit": above <= limit}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
