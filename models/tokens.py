"""The tokenizer of the bundled model: byte-level BPE, and the corpus as one array of token ids.

It promises that every text round-trips (there is no unknown token), that `<|bos|>` is id 0 and
`<|eos|>` id 1, and that encoding adds neither unless they are written out.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<|bos|>", "<|eos|>"
BATCH = 256


def train_tokenizer(articles: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE vocabulary from the articles."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(articles, trainer)
    return tokenizer


def _encoded(tokenizer: Tokenizer, articles: list[str]) -> Iterator[NDArray[np.uint16]]:
    for start in range(0, len(articles), BATCH):
        batch = [f"{BOS}{article}{EOS}" for article in articles[start : start + BATCH]]
        for encoding in tokenizer.encode_batch(batch):
            yield np.asarray(encoding.ids, dtype=np.uint16)


def encode_articles(tokenizer: Tokenizer, articles: list[str], seed: int) -> NDArray[np.uint16]:
    """Return the shuffled articles as one stream, each between `<|bos|>` and `<|eos|>`."""
    order = np.random.default_rng(seed).permutation(len(articles))
    return np.concatenate(list(_encoded(tokenizer, [articles[index] for index in order])))


def save_tokenizer(tokenizer: Tokenizer, out: Path, max_length: int) -> None:
    """Write the three tokenizer files that transformers reads."""
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    settings = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (("special_tokens_map", special), ("tokenizer_config", settings)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
