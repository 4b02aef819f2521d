"""Cost of a Fisher estimate beside that of an ordinary training step's passes, on the bundled model.

Both read the same tokens in batches of the same size, by turns within each round, so that a noisy machine disturbs
both. The ordinary pass is a forward and a backward with weight gradients of the cross-entropy; the estimate is
everything that `estimate_fisher` does. Prints a JSON line per round and one with the medians; the promise is a ratio of
at most 0.8.

    python benchmarks/fisher_cost.py [--sequences 8] [--length 512] [--rounds 9] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import process_time

ROOT = Path(__file__).parents[1]
LIMIT = 0.8
BATCH_TOKENS = 1024


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call, all threads together: what others do on the machine counts little."""
    started = process_time()
    work()
    return process_time() - started


def measure(sequences: int, length: int, rounds: int) -> list[dict[str, float]]:
    """Per round: seconds of both, and their ratio. The first round warms up and is dropped."""
    import torch
    import torch.nn.functional as F

    from core.evaluation.text import token_windows
    from core.networks import load_network, next_token_logits
    from core.sensitivity.fisher import estimate_fisher
    from core.storage.checkpoint import CheckpointIndex
    from core.storage.sources import folder_sources
    from models import BUNDLED

    network = load_network(CheckpointIndex.from_files(folder_sources(BUNDLED)), device="cpu", dtype=torch.float32)
    tokenizer = (BUNDLED / "tokenizer.json").read_bytes()
    windows = token_windows(tokenizer, "builtin", "calibration", sequences=sequences, sequence_length=length, seed=0)
    batch = max(1, BATCH_TOKENS // length)

    def ordinary() -> None:
        network.requires_grad_(True)
        for ids in torch.split(windows.ids, batch):
            logits = next_token_logits(network, ids[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()  # type: ignore[no-untyped-call]
            network.zero_grad(set_to_none=True)
        network.requires_grad_(False)

    def estimate() -> None:
        estimate_fisher(network, windows, seed=0, progress=lambda _fraction, _what: None, batch=batch)

    found = []
    for number in range(rounds + 1):
        first, second = (estimate, ordinary) if number % 2 else (ordinary, estimate)
        times = {work.__name__: seconds(work) for work in (first, second)}
        found.append(times | {"ratio": times["estimate"] / times["ordinary"]})
    return found[1:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    about = {"benchmark": "fisher_cost", "sequences": given.sequences, "length": given.length, "threads": given.threads}
    rounds = measure(given.sequences, given.length, given.rounds)
    for number, row in enumerate(rounds):
        print(json.dumps(about | {"round": number} | {key: round(value, 4) for key, value in row.items()}), flush=True)
    medians = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    ratio = medians["estimate"] / medians["ordinary"]
    line = {key: round(value, 4) for key, value in (medians | {"ratio": ratio}).items()}
    print(json.dumps(about | {"rounds": len(rounds)} | line | {"limit": LIMIT, "within_limit": ratio <= LIMIT}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
