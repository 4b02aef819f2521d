"""Seconds of data-aware rounding on one core: one 1024 x 1024 layer, whole and in its parts.

Rounds take turns (see `one_core`); the median of each is printed as JSON lines.

    python benchmarks/rounding_speed.py [--size 1024] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import process_time

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import parse
from core.rounding.base import Sensitivity, round_tensor
from core.rounding.objective import Objective
from core.rounding.successive import Scales, round_to_steps
from core.tensors.coded import coded_bytes
from tests.golden.covariance_families import family

TOKENS = 4096
PAPER = {"name": "watersic", "columns": "natural", "paths": 1, "mmse_damping": 0.0}


def cases(size: int) -> dict[str, Callable[[], object]]:
    """What is timed."""
    chance = np.random.default_rng(0)
    covariance = torch.from_numpy(family("scaled_ar1", size).copy())
    bf16 = torch.from_numpy(chance.standard_normal((TOKENS, size))).bfloat16().float()
    weight = torch.from_numpy(chance.standard_normal((size, size))).float()
    given = Sensitivity(covariance=covariance)
    objective = Objective.of(given)
    targets, steps = objective.targets(weight.double()), 0.5 / objective.units.numpy()
    codes = round_to_steps(targets.clone(), objective.factor, steps, Scales.ones(size, size)).numbers.T.astype(np.int8)

    single, lower = targets.float(), objective.factor.float()

    def whole(settings: dict[str, object], text: str) -> Callable[[], object]:
        spec, fmt = RoundingSpec.model_validate(settings), parse(text)
        return lambda: round_tensor(weight, fmt, spec, sensitivity=given, seed=0)

    return {
        f"part: covariance, {TOKENS} tokens": lambda: bf16.T @ bf16,
        "part: factor": lambda: Objective.of(given),
        "part: targets": lambda: objective.targets(weight.double()),
        "part: loop": lambda: round_to_steps(targets.clone(), objective.factor, steps, Scales.ones(size, size)),
        "part: loop, fp32": lambda: round_to_steps(single.clone(), lower, steps, Scales.ones(size, size)),
        "part: coding": lambda: coded_bytes(codes, "rans", 1),
        "gptq int4@128": whole({"name": "gptq"}, "int4@128"),
        "gptq grid3@tensor": whole({"name": "gptq"}, "grid3@tensor"),
        "watersic with rate search, rescalers": whole(PAPER, "grid3@tensor"),
        "watersic with rate search, no rescalers": whole(PAPER | {"rescale": False}, "grid3@tensor"),
        "watersic, 16 paths": whole({"name": "watersic"}, "grid3@tensor"),
        "error_diffusion nf4@64": whole({"name": "error_diffusion"}, "nf4@64"),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    todo, taken = cases(asked.size), dict[str, list[float]]()
    for number in range(asked.rounds + 1):
        for name, work in todo.items():
            begin = process_time()
            work()
            if number:  # the first compiles
                taken.setdefault(name, []).append(process_time() - begin)
    for name, seconds in taken.items():
        print(json.dumps({"what": name, "cpu_s": round(statistics.median(seconds), 4), "best": round(min(seconds), 4)}))


if __name__ == "__main__":
    main()
