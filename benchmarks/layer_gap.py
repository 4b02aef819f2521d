"""Distance from the limit of data-aware rounding, in stored bits: every covariance family, method and rate.

The layer is Normal, 4096 x 512, the statistics are exact. Rates are all stored bytes. Prints JSON lines. `--orders`
compares orders of columns and numbers of paths instead of methods.

    python benchmarks/layer_gap.py [--families ar1_0.9 ...] [--bits 2 3 4] [--rows 4096] [--columns 512] [--orders]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from time import process_time

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import parse
from core.rounding.layer import Layer
from tests.golden.covariance_families import FAMILIES, family, weights

PAPER = {"name": "watersic", "columns": "natural", "paths": 1, "mmse_damping": 0.0, "classes": False}
GRID, INTEGERS = "grid{}@tensor", "int{}@64"
METHODS = [
    ("gptq + code", {"name": "gptq"}, GRID),
    ("watersic (paper)", PAPER, GRID),
    ("watersic (paper, column classes)", PAPER | {"classes": True}, GRID),
    ("watersic", {"name": "watersic"}, GRID),
]
ORDERS = [
    (f"{name}, {columns}, {paths} paths", {"name": name, "columns": columns, "paths": paths}, text)
    for name, text in (("gptq", GRID), ("gptq", INTEGERS), ("watersic", GRID))
    for columns in ("natural", "ascending", "descending", "pivot")
    for paths in (1, 4, 16)
]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--bits", nargs="+", default=["2", "3", "4"])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--orders", action="store_true")
    asked = parser.parse_args()
    for name in asked.families:
        weight = torch.from_numpy(weights(asked.rows, asked.columns).copy()).float()
        layer = Layer(weight, family(name, asked.columns).copy(), None, None)
        for bits in asked.bits:
            for method, settings, text in ORDERS if asked.orders else METHODS:
                begin = process_time()
                found = layer.measure(parse(text.format(bits)), RoundingSpec.model_validate(settings))
                line = {"family": name, "method": method, "format": found["format"]}
                line |= {"bits_per_param": found["bits_per_param"]}
                line |= {"gap_bits": round(float(found["gap_bits"]), 4), "cpu_s": round(process_time() - begin, 2)}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
