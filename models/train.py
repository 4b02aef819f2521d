"""Train the bundled model from nothing: data, tokenizer, weights, export.

`python -m models.train --minutes 90 --out DIR` needs two CPU cores and the network for the first
download; a GPU is used when there is one. The learning rate follows elapsed time (`--minutes`) or
tokens (`--tokens`) and ends at zero, so the run ends when it was told to. It promises a folder that
transformers loads, with bf16 weights, and a checkpoint in `--work` from which the same command
resumes. The seed fixes the data order and the initial weights; with `--tokens` it fixes the result,
up to floating-point order.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from models.data import training_articles, wikitext_text
from models.fetch import DEFAULT_CACHE
from models.llama import Config, Llama
from models.muon import Muon
from models.tokens import encode_articles, save_tokenizer, train_tokenizer

BLOCK = 1024  # tokens per block of the stream; the last phase trains on whole blocks
WARM_UP, DECAY = 0.02, 0.4  # the shares of the run where warm-up ends and decay begins
VALIDATION_TOKENS = 65536


@dataclass
class Progress:
    """What a resumed run needs to know besides weights and optimiser state."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def prepare(cache: Path, config: Config, seed: int) -> tuple[Tokenizer, NDArray[np.uint16]]:
    """Return the tokenizer and the training stream, from the cache if they are there."""
    tokenizer_file, stream_file = cache / "tokenizer.json", cache / f"stream-{seed}.npy"
    if not stream_file.exists():
        log("downloading and cleaning the corpus, training the tokenizer (about two minutes)")
        articles = training_articles(cache)
        tokenizer = train_tokenizer(articles, config.vocab_size)
        tokenizer.save(str(tokenizer_file))
        np.save(stream_file, encode_articles(tokenizer, articles, seed))
    stream: NDArray[np.uint16] = np.load(stream_file)
    return Tokenizer.from_file(str(tokenizer_file)), stream


def log(message: str) -> None:
    """Write a line of progress to stderr."""
    print(message, file=sys.stderr, flush=True)


def blocks(stream: NDArray[np.uint16], count: int, seed: int, skip: int) -> Iterator[Tensor]:
    """Yield batches of (count, BLOCK + 1) ids, every block once an epoch, skipping `skip`."""
    epoch, served = 0, 0
    while True:
        rng = np.random.default_rng((seed, epoch))
        offset = int(rng.integers(BLOCK))
        starts = rng.permutation((len(stream) - offset - 1) // BLOCK) * BLOCK + offset
        for first in range(0, len(starts) - count + 1, count):
            served += 1
            if served > skip:
                rows = [stream[start : start + BLOCK + 1] for start in starts[first:][:count]]
                yield torch.from_numpy(np.stack(rows).astype(np.int64))
        epoch += 1


def split_rows(batch: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cut blocks into rows of `length` inputs and the targets one position later."""
    return batch[:, :-1].reshape(-1, length), batch[:, 1:].reshape(-1, length)


def learning_rate(share: float) -> float:
    """Return the factor on the peak rate when `share` of the run is over."""
    if share < WARM_UP:
        return 0.05 + 0.95 * share / WARM_UP
    return min(1.0, max(0.0, (1.0 - share) / (1.0 - DECAY)))


def optimisers(model: Llama) -> list[torch.optim.Optimizer]:
    """Return Muon for the hidden matrices and AdamW for everything else."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    rest = [
        {"params": [model.model.embed_tokens.weight], "lr": 0.01},
        {"params": [model.lm_head.weight], "lr": 0.004},
        {"params": norms, "lr": 0.004},
    ]
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    return [Muon(hidden, lr=0.02, weight_decay=0.05), adam]


class Trainer:
    """The training loop and its checkpoint."""

    def __init__(self, args: argparse.Namespace, config: Config, validation: Tensor) -> None:
        self.args, self.config, self.progress = args, config, Progress()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.validation = validation.to(self.device)
        torch.manual_seed(args.seed)
        self.model = Llama(config).to(self.device)
        self.optimisers = optimisers(self.model)
        self.peaks = [[g["lr"] for g in o.param_groups] for o in self.optimisers]
        self.loss = torch.compile(self.model, dynamic=False) if args.compile else self.model
        self.checkpoint = args.work / "checkpoint.pt"
        if self.checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        log(f"resumed at step {self.progress.step}")

    def save(self) -> None:
        """Write the checkpoint, never leaving half of one."""
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "progress": vars(self.progress),
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)

    def history(self) -> dict[str, str]:
        """Return what the checkpoint's metadata tells of its training."""
        progress = self.progress
        numbers = {"tokens_seen": progress.tokens, "steps": progress.step, "seconds": round(progress.seconds)}
        return {**{name: str(value) for name, value in numbers.items()}, "seed": str(self.args.seed)}

    def share(self) -> float:
        """Return how much of the run is over, in [0, 1]."""
        if self.args.tokens:
            return min(1.0, self.progress.tokens / float(self.args.tokens))
        return min(1.0, self.progress.seconds / (60.0 * float(self.args.minutes)))

    def _set_rates(self, factor: float) -> None:
        for optimiser, peaks in zip(self.optimisers, self.peaks, strict=True):
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def _autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

    def step(self, batch: Tensor) -> float:
        """Take one optimiser step on a batch of blocks and return its loss."""
        share = self.share()
        length = BLOCK if share > 1.0 - self.args.long_share else self.args.length
        self._set_rates(learning_rate(share))
        loss_of = self.loss if length == self.args.length else self.model  # no second compilation
        parts = torch.split(batch.to(self.device), max(1, self.args.micro_tokens // BLOCK))
        total = 0.0
        for part in parts:
            with self._autocast():
                loss = loss_of(*split_rows(part, length)) / len(parts)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.tokens += batch.shape[0] * BLOCK
        return total

    @torch.no_grad()
    def validate(self) -> float:
        """Return the loss (nats per token) on the start of WikiText-2's validation split."""
        losses = [self.model(*split_rows(part, 256)).item() for part in torch.split(self.validation, 4)]
        return float(np.mean(losses))

    def run(self, stream: NDArray[np.uint16]) -> None:
        """Train until the time or the tokens are used up."""
        start = time.monotonic() - self.progress.seconds
        reported, saved, mean = time.monotonic(), time.monotonic(), 0.0
        count = self.args.batch_tokens // BLOCK
        for batch in blocks(stream, count, self.args.seed, self.progress.step):
            if self.share() >= 1.0:
                break
            loss = self.step(batch)
            mean = loss if not mean else 0.95 * mean + 0.05 * loss
            now = time.monotonic()
            self.progress.seconds = now - start
            if now - reported > self.args.report:
                self._report(mean)
                reported = time.monotonic()
            if now - saved > 240:
                self.save()
                log(f"validation loss {self.validate():.4f}; checkpoint written")
                saved = time.monotonic()
            self.progress.seconds = time.monotonic() - start
        self.save()
        log(f"done: {vars(self.progress)}, validation loss {self.validate():.4f}")

    def _report(self, mean: float) -> None:
        progress, share = self.progress, self.share()
        left = progress.seconds * (1.0 - share) / max(share, 1e-6)
        log(
            f"step {progress.step}  tokens {progress.tokens / 1e6:.2f}M  loss {mean:.4f}  "
            f"lr x{learning_rate(share):.3f}  {progress.tokens / progress.seconds:.0f} tok/s  "
            f"{100 * share:.1f} %  ETA {left / 60:.1f} min"
        )


def export(model: Llama, config: Config, tokenizer: Tokenizer, out: Path, history: dict[str, str]) -> None:
    """Write the model and the tokenizer as a transformers checkpoint in bf16, and its history as metadata."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {n: t.detach().cpu().to(torch.bfloat16) for n, t in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt", **history})
    (out / "model.safetensors").chmod(0o644)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    generation = {**ids, "pad_token_id": config.eos_token_id}
    for name, content in (
        ("config", config.to_transformers()),
        ("generation_config", generation),
    ):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    save_tokenizer(tokenizer, out, config.max_positions)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m models.train", description=__doc__)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train for this long")
    length.add_argument("--tokens", type=float, help="train on this many tokens")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="downloads, tokens")
    parser.add_argument("--seed", type=int, default=20, help="data order and initial weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--length", type=int, default=256, help="row length in tokens")
    parser.add_argument("--long-share", type=float, default=0.1, help="share of 1024-token rows")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--micro-tokens", type=int, default=4096)
    parser.add_argument("--report", type=float, default=20.0, help="seconds between reports")
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs g++ on CPU)")
    return parser.parse_args(argv)


def main() -> None:
    """Train and export."""
    args = arguments()
    torch.set_num_threads(args.threads)
    config = Config()
    tokenizer, stream = prepare(args.cache, config, args.seed)
    text = wikitext_text("valid", args.cache)
    ids = torch.tensor(tokenizer.encode(text).ids[: VALIDATION_TOKENS + 1])
    validation = ids.unfold(0, BLOCK + 1, BLOCK)
    log(f"{len(stream) / 1e6:.1f}M training tokens, {len(text) / 1e6:.1f}M characters validation")
    trainer = Trainer(args, config, validation)
    trainer.run(stream)
    export(trainer.model, config, tokenizer, args.out, trainer.history())


if __name__ == "__main__":
    main()
