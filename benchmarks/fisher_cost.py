"""Cost of a Fisher estimate beside that of an ordinary training step's passes, on the bundled model.

Both read the same tokens in batches of the same size, by turns within each round, so that a noisy machine disturbs
both. The ordinary pass is a forward and a backward with weight gradients of the cross-entropy; the estimate is
everything that `estimate_fisher` does with a whole network in memory. `bare` is the floor: the ordinary pass without
weight gradients, where nothing is measured. `by_blocks` is what a job does: the same estimate with a block in memory at
a time, which costs another forward pass and reading every weight twice. Prints a JSON line per round and one with the
medians; the promise is a ratio of at most 0.8 for the estimate. It rises with the length, because attention costs both
the same. `again` is `by_blocks` relative to the estimate.

    python benchmarks/fisher_cost.py [--sequences 64] [--length 256] [--rounds 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 0.8
BATCH_TOKENS = 1024


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call, all threads together: what others do on the machine counts little."""
    started = process_time()
    work()
    return process_time() - started


def measure(sequences: int, length: int, rounds: int) -> list[dict[str, float]]:
    """Seconds of each per round. The first round warms up and is dropped."""
    import torch
    import torch.nn.functional as F

    from core.evaluation.text import token_windows
    from core.networks import load_network, next_token_logits
    from core.sensitivity.fisher import estimate_fisher, fisher_of_checkpoint
    from core.storage.checkpoint import CheckpointIndex
    from core.storage.sources import folder_sources
    from models import BUNDLED

    index = CheckpointIndex.from_files(folder_sources(BUNDLED))
    network = load_network(index, device="cpu", dtype=torch.float32)
    tokenizer = (BUNDLED / "tokenizer.json").read_bytes()
    windows = token_windows(tokenizer, "builtin", "calibration", sequences=sequences, sequence_length=length, seed=0)
    batch = max(1, BATCH_TOKENS // length)

    def passes() -> None:
        for ids in torch.split(windows.ids, batch):
            logits = next_token_logits(network, ids[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()  # type: ignore[no-untyped-call]
            network.zero_grad(set_to_none=True)

    def ordinary() -> None:
        network.requires_grad_(True)
        passes()
        network.requires_grad_(False)

    def bare() -> None:
        table: Any = network
        hook = table.get_input_embeddings().register_forward_hook(lambda _layer, _ids, out: out.requires_grad_())
        passes()
        hook.remove()

    def estimate() -> None:
        estimate_fisher(network, windows, seed=0, progress=lambda _fraction, _what: None, batch=batch)

    def by_blocks() -> None:
        with tempfile.TemporaryDirectory() as folder:
            fisher_of_checkpoint(
                index,
                windows,
                device="cpu",
                dtype=torch.float32,
                seed=0,
                progress=lambda _fraction, _what: None,
                folder=Path(folder),
                log=lambda _event, fields: print(fields, file=sys.stderr),
                batch=batch,
            )

    works = (ordinary, estimate, bare)
    found = [{work.__name__: seconds(work) for work in works[:: (-1) ** number]} for number in range(rounds + 1)][1:]
    # Apart, because it hands memory back to the system, which the next to ask for some pays for.
    return [row | {"by_blocks": seconds(by_blocks)} for row in found]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    about = {"benchmark": "fisher_cost", "sequences": given.sequences, "length": given.length, "threads": given.threads}
    rounds = measure(given.sequences, given.length, given.rounds)
    for number, row in enumerate(rounds):
        print(json.dumps(about | {"round": number} | {key: round(value, 4) for key, value in row.items()}), flush=True)
    medians = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    ratio, floor = (medians[work] / medians["ordinary"] for work in ("estimate", "bare"))
    shares = {"ratio": ratio, "floor": floor, "again": medians["by_blocks"] / medians["estimate"]}
    line = {key: round(value, 4) for key, value in (medians | shares).items()}
    print(json.dumps(about | {"rounds": len(rounds)} | line | {"limit": LIMIT, "within_limit": ratio <= LIMIT}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
