"""How files are cut into parts, and a file read through its parts before they are put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from core.errors import InvalidCheckpoint
from core.storage.object_store import ObjectStore


def part_count(size: int, part_size: int) -> int:
    """Parts of a file of `size` bytes; an empty file has none."""
    return -(-size // part_size)


def part_length(size: int, part_size: int, number: int) -> int | None:
    """Bytes of part `number` (from 1), None when the file has no such part."""
    if not 1 <= number <= part_count(size, part_size):
        return None
    return min(part_size, size - (number - 1) * part_size)


class PartsSource:
    """A file whose bytes lie in several objects: a `ByteSource`. `parts`: (key, size) in order."""

    def __init__(self, store: ObjectStore, parts: Sequence[tuple[str, int]], where: str) -> None:
        self._store, self._parts, self._where = store, list(parts), where
        self._starts = [0, *accumulate(size for _, size in self._parts)]

    @property
    def size(self) -> int:
        return self._starts[-1]

    def read(self, start: int, length: int) -> bytearray:
        """Exactly `length` bytes from `start`; InvalidCheckpoint past the end."""
        if start < 0 or length < 0 or start + length > self.size:
            raise InvalidCheckpoint(f"bytes {start}..{start + length} of {self.size} were asked for", where=self._where)
        buffer = bytearray()
        for (key, size), begin in zip(self._parts, self._starts, strict=False):
            low, high = max(start, begin), min(start + length, begin + size)
            if low < high:
                buffer += self._store.read(key, low - begin, high - low)
        return buffer

    def stream(self) -> Iterator[bytes]:
        """All bytes in order."""
        for key, _ in self._parts:
            yield from self._store.stream(key)
