"""Print the numbers of a model card: `python -m models.evaluate_card FOLDER`.

It promises the same table for the same weights, to the digits shown: bf16 weights computed in
float32, the raw text of WikiText-2's test split tokenised as one piece without special tokens, cut
into rows whose every token but the very first is scored once, given what precedes it in its row.
Words are counted as the benchmark does: whatever stands between spaces, and one for each line end.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from models import BUNDLED
from models.data import wikitext_articles, wikitext_text
from models.fetch import DEFAULT_CACHE

ROWS = 16384  # tokens per forward pass


@dataclass(frozen=True)
class Score:
    """The summed negative log-likelihood of a text, and the units to divide it by."""

    nats: float
    tokens: int
    words: int
    bytes: int

    @property
    def token_perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def word_perplexity(self) -> float:
        return math.exp(self.nats / self.words)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2.0) / self.bytes


def load(folder: Path) -> tuple[Any, Any]:
    """Return model (float32) and tokenizer, as transformers loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def _nats(model: Any, ids: Tensor, length: int) -> float:
    """Score `ids[1:]` in rows of `length`; the last row may be shorter."""
    whole = (len(ids) - 1) // length * length
    inputs, targets = ids[:whole].view(-1, length), ids[1 : whole + 1].view(-1, length)
    batches = list(zip(torch.split(inputs, ROWS // length), torch.split(targets, ROWS // length), strict=True))
    if whole < len(ids) - 1:
        batches.append((ids[None, whole:-1], ids[None, whole + 1 :]))
    losses = [
        F.cross_entropy(model(row, use_cache=False).logits.flatten(0, 1), target.flatten(), reduction="sum")
        for row, target in batches
        if row.numel()
    ]
    return float(torch.stack(losses).double().sum())


def score(model: Any, tokenizer: Any, text: str, length: int) -> Score:
    """Score a text in rows of `length` tokens."""
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    words = len(text.split()) + text.count("\n")
    return Score(_nats(model, ids, length), len(ids) - 1, words, len(text.encode("utf-8")))


def row(name: str, result: Score) -> str:
    """Return one line of the card's table of scores."""
    return f"| {name} | {result.token_perplexity:.2f} | {result.word_perplexity:.1f} | {result.bits_per_byte:.3f} |"


def first_article(text: str) -> str:
    """Return the first article of a WikiText split."""
    return next(iter(wikitext_articles(text).values())) + "\n"


def scores(folder: Path, text: str) -> list[str]:
    """Return the table of scores on WikiText-2's test split."""
    model, tokenizer = load(folder)
    lines = ["| Text, tokens per row | perplexity per token | perplexity per word | bits per byte |"]
    lines.append("| --- | ---: | ---: | ---: |")
    lines += [row(f"WikiText-2 test, {length}", score(model, tokenizer, text, length)) for length in (256, 1024, 2048)]
    lines.append(row("its first article, 256", score(model, tokenizer, first_article(text), 256)))
    return lines


def facts(folder: Path) -> list[str]:
    """Return the table of what the files themselves say."""
    weights = folder / "model.safetensors"
    with safe_open(weights, framework="pt") as opened:
        history = {name: value for name, value in sorted((opened.metadata() or {}).items()) if name != "format"}
        parameters = sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text())
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    pairs = {
        "parameters": f"{parameters:,}",
        "weights, bytes": f"{weights.stat().st_size:,}",
        **{name.replace("_", " "): f"{int(value):,}" for name, value in history.items()},
        **{name.replace("_", " "): str(config[name]) for name in (*shape, "vocab_size")},
    }
    return ["| Fact | Value |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in pairs.items())]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m models.evaluate_card", description="Numbers of a model card.")
    parser.add_argument("folder", type=Path, nargs="?", default=BUNDLED)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the download")
    args = parser.parse_args()
    print("\n".join([*facts(args.folder), "", *scores(args.folder, wikitext_text("test", args.cache))]))


if __name__ == "__main__":
    main()
