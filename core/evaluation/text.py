"""Text as windows of tokens, by the checkpoint's own tokenizer.

A text is `builtin` (prose and code from the documentation of Python, cut into a calibration and an evaluation part that
share no paragraph), `file:NAME` (a file of the checkpoint), `hf:...` (a data set of the hub) or a path. Same text,
tokenizer, split, sizes and seed give the same windows; their sha256 names them. The windows do not overlap, are not
padded, and begin with the token that the tokenizer itself puts first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from core.errors import EmptyText, InvalidCheckpoint, MissingFile, PathNotAllowed, UserError
from core.evaluation.hub_text import dataset_text
from core.ids import derived_seed

Split = Literal["calibration", "evaluation"]
OpenFile = Callable[[str], bytes]

BUILTIN = "builtin"
MAX_TEXT_BYTES = 256 << 20
_MIN_TOKENS = 16
_PIECE = 1 << 18  # characters tokenised at a time
_SHARES: dict[Split, float] = {"calibration": 0.6, "evaluation": 0.4}


@dataclass(frozen=True)
class Windows:
    """Token ids (sequences, length), int64; `tokens_available` is how many the text had before the choice."""

    ids: torch.Tensor
    sha256: str
    tokens_available: int

    @classmethod
    def of(cls, ids: torch.Tensor, tokens_available: int) -> Windows:
        """The windows under the digest of their ids."""
        wide = ids.to(torch.int64).contiguous()
        return cls(wide, hashlib.sha256(wide.numpy().tobytes()).hexdigest(), tokens_available)


def token_windows(
    tokenizer_json: bytes,
    text: str,
    split: Split,
    *,
    sequences: int,
    sequence_length: int,
    seed: int,
    open_file: OpenFile | None = None,
) -> Windows:
    """At most `sequences` windows of `sequence_length` tokens; fewer when the text has no more.

    Calibration draws them by `seed`, evaluation spaces them evenly. A text that is shorter than one window but has 16
    tokens gives one shorter window. EmptyText, InvalidCheckpoint for a tokenizer that cannot be used, and what reading
    the text raises.
    """
    if sequences < 1 or sequence_length < 2:
        raise UserError(f"{sequences} sequences of {sequence_length} tokens are no text to predict")
    tokenizer = _tokenizer(tokenizer_json)
    first = _first_token(tokenizer)
    tokens = _tokens(tokenizer, _read(text, split, open_file))
    step = sequence_length - len(first)
    if len(tokens) < step:
        if len(tokens) < _MIN_TOKENS:
            raise EmptyText(f"holds {len(tokens)} tokens, {min(step, _MIN_TOKENS)} are needed", where=text[:200])
        step = len(tokens)
    rows = tokens[: len(tokens) // step * step].reshape(-1, step)
    rows = rows[_chosen(len(rows), sequences, split, seed)]
    head = torch.tensor(first, dtype=torch.int64).expand(len(rows), len(first))
    return Windows.of(torch.cat((head, rows), dim=1), len(tokens))


def _chosen(count: int, wanted: int, split: Split, seed: int) -> torch.Tensor:
    if count <= wanted:
        return torch.arange(count)
    if split == "evaluation":
        return torch.arange(wanted) * count // wanted
    chance = torch.Generator().manual_seed(derived_seed(seed, "windows"))
    return torch.randperm(count, generator=chance)[:wanted]


def _read(text: str, split: Split, open_file: OpenFile | None) -> str:
    if text == BUILTIN:
        return builtin_text(split)
    if text.startswith("hf:"):
        return dataset_text(text, split)
    if text.startswith("file:"):
        name = text.removeprefix("file:")
        if open_file is None:
            raise MissingFile("there are no files beside this text", where=name[:200])
        return _decoded(open_file(name), name)
    return _decoded(_file_bytes(Path(text)), text)


def _file_bytes(path: Path) -> bytes:
    where = str(path)[:200]
    try:
        if not path.exists():
            raise MissingFile("no such text", where=where, hint="`builtin`, `file:NAME` or the path of a text file")
        if not path.is_file():
            raise PathNotAllowed("not a regular file", where=where)
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise UserError(f"larger than {MAX_TEXT_BYTES >> 20} MiB", where=where, hint="a part of it will do")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise MissingFile(f"cannot be read: {error}"[:300], where=where) from error


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start}", where=where[:200]) from error


def builtin_text(split: Split) -> str:
    """That part of the built-in text: whole topics of Python's language reference, about 60 % and 40 % of it.

    Topics quote each other, so a paragraph counts only where it stands first. The longest topic goes to the part that
    lacks most, then the next.
    """
    topics = _unrepeated_topics()
    parts: dict[Split, list[str]] = {"calibration": [], "evaluation": []}
    total = sum(map(len, topics.values()))
    lacking = {part: share * total for part, share in _SHARES.items()}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        part = max(lacking, key=lambda part: lacking[part])
        lacking[part] -= len(topics[name])
        parts[part].append(name)
    return "\n\n".join(topics[name] for name in sorted(parts[split]))


def _unrepeated_topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics):
        fresh = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                fresh.append(paragraph.strip("\n"))
        kept[name] = "\n\n".join(fresh)
    return kept


def _tokenizer(data: bytes) -> Any:
    """The tokenizer without truncation and padding."""
    from tokenizers import Tokenizer

    def made() -> Any:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    return _guarded(made)


def _first_token(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before a text, if it does; none or one id."""
    bare = _guarded(lambda: tokenizer.encode("a", add_special_tokens=False).ids)
    dressed = _guarded(lambda: tokenizer.encode("a", add_special_tokens=True).ids)
    return dressed[:1] if len(dressed) > len(bare) and dressed[1 : 1 + len(bare)] == bare else []


def _tokens(tokenizer: Any, text: str) -> torch.Tensor:
    """All ids of a text, tokenised in pieces that end with a line where there is one."""

    def encoded(piece: str) -> torch.Tensor:
        return torch.tensor(tokenizer.encode(piece, add_special_tokens=False).ids, dtype=torch.int64)

    ids = [_guarded(partial(encoded, piece)) for piece in _pieces(text)]
    return torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _guarded(call: Callable[[], Any]) -> Any:
    """What the tokenizers library answers; whatever it raises, panics included, as InvalidCheckpoint."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InvalidCheckpoint(f"the tokenizer cannot be used: {reason}", where="tokenizer.json") from error
