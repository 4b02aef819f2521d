"""Texts as windows of tokens: disjoint parts, the same windows every time, and refusals that say what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import BitmillError, EmptyText, InvalidCheckpoint, MissingFile, PathNotAllowed
from core.evaluation import text as module
from core.evaluation.text import builtin_text, token_windows
from tests.unit.pipeline.conftest import byte_tokenizer

BYTES = byte_tokenizer().encode()
SPLITS: tuple[Literal["calibration", "evaluation"], ...] = ("calibration", "evaluation")


def words_tokenizer(first: str | None = None) -> bytes:
    """One token per word w0, w1, ...; `first` is put before a text by the tokenizer's own template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {f"w{at}": at for at in range(1000)} | {"<s>": 1000, "a": 1001}
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if first:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 1000)])
    return str(tokenizer.to_str()).encode()


def numbered(tmp_path: Path, count: int) -> str:
    """A text of `count` words w0 w1 ..."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{at}" for at in range(count)))
    return str(path)


def windows(
    text: str,
    split: Literal["calibration", "evaluation"] = "evaluation",
    tokenizer: bytes = BYTES,
    sequences: int = 4,
    length: int = 32,
    seed: int = 0,
    **more: Any,
) -> module.Windows:
    return token_windows(tokenizer, text, split, sequences=sequences, sequence_length=length, seed=seed, **more)


def test_the_built_in_parts_share_no_paragraph_and_are_both_long_enough() -> None:
    parts = [{" ".join(one.split()) for one in builtin_text(split).split("\n\n")} for split in SPLITS]
    assert not parts[0] & parts[1]
    sizes = [len(builtin_text(split)) for split in SPLITS]
    assert sizes[0] / sum(sizes) == pytest.approx(0.6, abs=0.01)
    assert min(sizes) > 100_000
    for split in SPLITS:
        assert builtin_text(split).count(" the ") > 1000  # prose
        assert ">>> " in builtin_text(split)  # and code


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_request_gives_the_same_windows_under_the_same_digest(split: Literal["calibration"]) -> None:
    one, other = (windows("builtin", split) for _ in range(2))
    assert torch.equal(one.ids, other.ids)
    assert one.sha256 == other.sha256
    assert one.ids.shape == (4, 32)
    assert one.ids.dtype == torch.int64


def test_calibration_and_evaluation_draw_from_different_text() -> None:
    assert windows("builtin", "calibration").sha256 != windows("builtin", "evaluation").sha256


def test_the_seed_chooses_the_calibration_windows_but_not_the_evaluation_windows() -> None:
    assert windows("builtin", "calibration", seed=1).sha256 != windows("builtin", "calibration", seed=2).sha256
    assert windows("builtin", "evaluation", seed=1).sha256 == windows("builtin", "evaluation", seed=2).sha256


@given(st.integers(16, 300), st.integers(1, 12), st.integers(2, 40), st.integers(0, 99), st.sampled_from(SPLITS))
def test_windows_are_whole_runs_of_the_text_and_never_overlap(
    count: int, sequences: int, length: int, seed: int, split: Literal["calibration", "evaluation"]
) -> None:
    text = " ".join(f"w{at}" for at in range(count)).encode()
    found = token_windows(
        words_tokenizer(),
        "file:t",
        split,
        sequences=sequences,
        sequence_length=length,
        seed=seed,
        open_file=lambda _: text,
    )
    assert found.tokens_available == count
    assert len(found.ids) == max(1, min(sequences, count // length))
    assert found.ids.shape[1] == min(length, count)
    assert (found.ids.diff(dim=1) == 1).all()
    assert len(set(found.ids.flatten().tolist())) == found.ids.numel()


def test_evaluation_windows_are_spread_evenly(tmp_path: Path) -> None:
    found = windows(numbered(tmp_path, 1000), tokenizer=words_tokenizer(), sequences=5, length=20)
    assert found.ids[:, 0].tolist() == [0, 200, 400, 600, 800]


def test_a_text_with_fewer_windows_gives_what_it_has(tmp_path: Path) -> None:
    found = windows(numbered(tmp_path, 70), tokenizer=words_tokenizer(), sequences=10, length=20)
    assert (found.ids.shape, found.tokens_available) == ((3, 20), 70)


def test_a_text_shorter_than_a_window_gives_one_shorter_window(tmp_path: Path) -> None:
    assert windows(numbered(tmp_path, 16), tokenizer=words_tokenizer(), length=500).ids.shape == (1, 16)


def test_a_text_of_too_few_tokens_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(EmptyText, match="15 tokens, 16"):
        windows(numbered(tmp_path, 15), tokenizer=words_tokenizer(), length=500)


def test_the_first_token_is_the_tokenizers_own_and_stands_before_every_window(tmp_path: Path) -> None:
    found = windows(numbered(tmp_path, 100), tokenizer=words_tokenizer("<s>"), sequences=3, length=11)
    assert found.ids.shape == (3, 11)
    assert set(found.ids[:, 0].tolist()) == {1000}
    assert found.ids[0, 1:].tolist() == list(range(10))


def test_truncation_and_padding_of_the_tokenizer_do_not_shorten_the_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_str(words_tokenizer().decode())
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    found = windows(numbered(tmp_path, 100), tokenizer=str(tokenizer.to_str()).encode())
    assert found.tokens_available == 100


def test_a_long_text_is_tokenised_in_pieces_that_end_with_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(f"w{at} w{at + 1}\n" for at in range(0, 500, 2)).encode()
    whole = windows("file:t", tokenizer=words_tokenizer(), open_file=lambda _: lines)
    monkeypatch.setattr(module, "_PIECE", 100)
    assert windows("file:t", tokenizer=words_tokenizer(), open_file=lambda _: lines).sha256 == whole.sha256


def test_texts_that_cannot_be_read_are_refused_each_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 100)
    refusals: dict[str, tuple[type[BitmillError], str]] = {
        str(tmp_path / "nothing.txt"): (MissingFile, "no such text"),
        str(tmp_path): (PathNotAllowed, "regular"),
        "/dev/zero": (PathNotAllowed, "regular"),
        "no\0path": (MissingFile, "no such text"),
        str(tmp_path / "latin.txt"): (BitmillError, "UTF-8"),
        "file:text.txt": (MissingFile, "no files"),
    }
    for text, (kind, reason) in refusals.items():
        with pytest.raises(kind, match=reason):
            windows(text)


def test_a_file_larger_than_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TEXT_BYTES", 10)
    with pytest.raises(BitmillError, match="larger"):
        windows(numbered(tmp_path, 100))


@pytest.mark.parametrize(
    "tokenizer",
    [
        b"",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"version": "1.0", "model": {"type": "NoSuchModel"}}',
        json.dumps({**json.loads(BYTES), "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}).encode(),
        json.dumps({**json.loads(BYTES), "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}).encode(),
        json.dumps({**json.loads(BYTES), "normalizer": {"type": "Replace"}}).encode(),
    ],
    ids=range(8),
)
def test_a_tokenizer_that_cannot_be_used_is_the_checkpoints_fault(tokenizer: bytes) -> None:
    with pytest.raises(InvalidCheckpoint) as refused:
        windows("builtin", tokenizer=tokenizer)
    assert refused.value.where == "tokenizer.json"
