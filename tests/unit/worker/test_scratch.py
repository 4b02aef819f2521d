"""Scratch folders: what a killed worker leaves is removed, what a living one has is not touched."""

from __future__ import annotations

from pathlib import Path

from worker import scratch


def test_only_the_folders_of_dead_workers_are_removed(tmp_path: Path) -> None:
    dead = scratch.take(tmp_path, "wrk_dead")
    (tmp_path / "wrk_dead" / "att_1").mkdir()
    dead.close()
    living = scratch.take(tmp_path, "wrk_living")
    (tmp_path / "uploads").mkdir()
    assert scratch.remove_abandoned(tmp_path) == ["wrk_dead"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["uploads", "wrk_living"]
    living.close()
    scratch.give_back(tmp_path, "wrk_living")
    assert not (tmp_path / "wrk_living").exists()


def test_there_may_be_no_scratch_folder_yet(tmp_path: Path) -> None:
    assert scratch.remove_abandoned(tmp_path / "absent") == []
