"""What a shelf gives back: the very bits, in memory or from its file."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import OutOfDisk, UnsupportedArchitecture
from core.sensitivity.shelf import Kept, Shelf

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=8), st.integers(0, 200), st.randoms())
def test_what_is_taken_is_what_was_put_in_whatever_order(
    tmp_path: Path, wanted: list[tuple[tuple[int, ...], torch.dtype]], limit: int, order: Any
) -> None:
    with Shelf(tmp_path, limit) as shelf:
        tensors = [torch.randn(shape).to(dtype) for shape, dtype in wanted]
        kept = list(enumerate(shelf.put(one) for one in tensors))
        assert sum(one.tensor.nbytes for _, one in kept if one.tensor is not None) <= limit
        order.shuffle(kept)
        for at, one in kept:
            taken = shelf.take(one)
            assert taken.dtype == tensors[at].dtype
            assert torch.equal(taken, tensors[at])


def test_a_view_whose_rows_do_not_follow_each_other_is_itself_again(tmp_path: Path) -> None:
    wide = torch.arange(24.0).view(4, 6)
    with Shelf(tmp_path, 0) as shelf:
        assert torch.equal(shelf.take(shelf.put(wide[:, ::2].T)), wide[:, ::2].T)


def test_a_tensor_with_a_history_comes_back_without_it(tmp_path: Path) -> None:
    given_ = torch.ones(3, requires_grad=True) * 2
    for limit in (0, 100):
        with Shelf(tmp_path, limit) as shelf:
            assert not shelf.take(shelf.put(given_)).requires_grad


def test_room_in_memory_is_free_again_after_taking(tmp_path: Path) -> None:
    with Shelf(tmp_path, 16) as shelf:
        first = shelf.put(torch.ones(4))
        assert shelf.put(torch.ones(4)).tensor is None
        shelf.take(first)
        assert shelf.put(torch.ones(4)).tensor is not None


def test_its_file_has_no_name(tmp_path: Path) -> None:
    with Shelf(tmp_path, 0) as shelf:
        shelf.put(torch.ones(100))
        assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_was_written_to_meanwhile_is_refused(tmp_path: Path) -> None:
    with Shelf(tmp_path, 1000) as shelf:
        tensor = torch.ones(3)
        kept = shelf.put(tensor)
        tensor.add_(1)
        with pytest.raises(UnsupportedArchitecture, match="overwrites"):
            shelf.take(kept)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    class Full:
        def seek(self, _place: int) -> None:
            pass

        def write(self, _data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "no space left")

    with Shelf(tmp_path, 0) as shelf:
        shelf._file = Full()  # type: ignore[assignment]
        with pytest.raises(OutOfDisk) as refused:
            shelf.put(torch.ones(3))
    assert refused.value.where == str(tmp_path)


def test_a_disk_that_writes_less_than_it_was_given_is_given_the_rest(tmp_path: Path) -> None:
    tensor = torch.randn(50)
    with Shelf(tmp_path, 0) as shelf:
        real: Any = shelf._file

        class Slow:
            seek, readinto = real.seek, real.readinto

            @staticmethod
            def write(data: memoryview) -> int:
                return int(real.write(data[:7]))

        shelf._file = Slow()  # type: ignore[assignment]
        kept: Kept = shelf.put(tensor)
        assert torch.equal(shelf.take(kept), tensor)
