"""The pure parts of streaming: ranges, file names, ETags, the wire format of events."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from email.message import Message
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.streaming import ByteRange, UnsatisfiableRangeError, attachment, matches, parse_range, sse
from core.jobs.views import EventView

SIZES = st.integers(1, 1000)


@given(SIZES, st.data())
def test_a_range_names_the_bytes_that_slicing_names(size: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first, 2 * size))
    content = bytes(number % 251 for number in range(size))
    found = parse_range(f"bytes={first}-{last}", size)
    assert found is not None
    assert content[found.start : found.end] == content[first : last + 1]
    assert parse_range(f"bytes={first}-", size) == ByteRange(first, size)


@given(SIZES, st.integers(1, 2000))
def test_a_suffix_is_the_last_bytes(size: int, length: int) -> None:
    content = bytes(number % 251 for number in range(size))
    found = parse_range(f"bytes=-{length}", size)
    assert found is not None
    assert content[found.start : found.end] == content[-length:]


@given(st.text(max_size=30), SIZES)
def test_no_header_breaks_the_parser_or_leaves_the_object(header: str, size: int) -> None:
    try:
        found = parse_range(header, size)
    except UnsatisfiableRangeError:
        return
    assert found is None or 0 <= found.start < found.end <= size


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=0-0", "bytes=-1"])
def test_nothing_of_an_empty_object_can_be_asked_for(header: str) -> None:
    with pytest.raises(UnsatisfiableRangeError):
        parse_range(header, 0)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=60))
def test_any_file_name_survives_in_a_header_of_ascii(name: str) -> None:
    header = attachment(name)
    assert header.isascii()
    parsed = Message()
    parsed["Content-Disposition"] = header
    assert unquote(header.partition("filename*=UTF-8''")[2]) == name
    assert parsed.get_content_disposition() == "attachment"


@pytest.mark.parametrize("header", ['"a"', 'W/"a"', '"b", "a"', "*"])
def test_an_etag_is_found_in_its_list(header: str) -> None:
    assert matches(header, '"a"')


@pytest.mark.parametrize("header", [None, "", '"b"', "a"])
def test_another_etag_is_not(header: str | None) -> None:
    assert not matches(header, '"a"')


@given(st.text(max_size=50))
def test_an_event_is_one_message_whatever_its_text(text: str) -> None:
    event = EventView(
        seq=7, kind="step.progress", at=datetime(2026, 1, 1, tzinfo=UTC), job="job_1", data={"note": text}
    )
    lines = sse(event).split("\n")
    assert lines[:2] == ["id: 7", "event: step.progress"]
    assert lines[3:] == ["", ""]
    assert json.loads(lines[2].removeprefix("data: "))["data"]["note"] == text
