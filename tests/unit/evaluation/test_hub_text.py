"""Text of a data set of the hub, from Parquet files that a pretended hub hands out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from core.errors import NotFound, StoreUnavailable, UserError
from core.evaluation.hub_text import REVISION, dataset_text

FILES = {
    "default/train/0000.parquet": {"id": [1, 2], "text": ["one", "two"]},
    "default/train/0001.parquet": {"id": [3], "text": ["three"]},
    "default/test/0000.parquet": {"id": [4], "text": ["four"]},
    "small/partial-train/0000.parquet": {"body": ["five", ""], "text_length": [4, 0]},
    "numbers/train/0000.parquet": {"id": [1]},
    "README.md": None,
}


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of the files that were downloaded."""
    asked: list[str] = []

    def listed(_self: object, repo: str, *, repo_type: str, revision: str) -> list[str]:
        assert (repo_type, revision) == ("dataset", REVISION)
        if repo == "org/away":
            raise OSError("no route to host")
        return list(FILES)

    def download(repo: str, name: str, *, repo_type: str, revision: str) -> str:
        asked.append(name)
        path = tmp_path / name.replace("/", "-")
        columns: Any = FILES[name]
        parquet.write_table(pyarrow.table(columns), path)
        return str(path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


@pytest.mark.parametrize(
    ("text", "split", "expected"),
    [
        ("hf:org/data", "calibration", "one\n\ntwo\n\nthree"),
        ("hf:org/data", "evaluation", "four"),
        ("hf:org/data:train", "evaluation", "one\n\ntwo\n\nthree"),
        ("hf:org/data:default:test", "calibration", "four"),
        ("hf:org/data:small", "evaluation", "five"),
    ],
)
def test_configuration_and_split_are_found_by_name_or_by_purpose(text: str, split: str, expected: str) -> None:
    assert dataset_text(text, split) == expected


def test_no_more_is_downloaded_than_is_needed(hub: list[str]) -> None:
    assert dataset_text("hf:org/data", "calibration", limit=6) == "one\n\ntwo"
    assert hub == ["default/train/0000.parquet"]


def test_what_is_not_there_is_said_with_what_is() -> None:
    with pytest.raises(NotFound, match="no holdout in default") as refused:
        dataset_text("hf:org/data:holdout", "calibration")
    assert "default:test" in refused.value.hint


def test_a_data_set_without_text_is_refused() -> None:
    with pytest.raises(UserError, match="no column of text"):
        dataset_text("hf:org/data:numbers:train", "calibration")


def test_a_hub_that_is_away_is_a_reason_to_try_again() -> None:
    with pytest.raises(StoreUnavailable) as failed:
        dataset_text("hf:org/away", "calibration")
    assert failed.value.retryable
