"""The parts of the embedded stack that need no servers."""

import itertools
import json
import socket
from pathlib import Path

import pytest

from cli import stack as stack_module
from cli.stack import Stack, StackOptions
from core.config import Settings
from core.errors import Conflict


def _stack(tmp_path: Path, port: int | None = None, **settings: str) -> Stack:
    return Stack(StackOptions(tmp_path / "d", port=port), Settings(**settings))  # type: ignore[arg-type]


def test_the_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    first = stack_module._stored_key(tmp_path / "key")
    assert len(first) > 40
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert stack_module._stored_key(tmp_path / "key") == first


def test_servers_that_the_settings_name_are_not_started(tmp_path: Path) -> None:
    stack = _stack(tmp_path, database_url="postgresql://db/x", broker_url="redis://b/0", store_url="s3://bucket")
    environment = stack._environment()
    stack._start_servers(environment)
    assert stack._kept == []
    assert environment["BITMILL_DATABASE_URL"] == "postgresql://db/x"
    assert environment["BITMILL_BROKER_URL"] == "redis://b/0"
    assert environment["BITMILL_STORE_URL"] == "s3://bucket"


def test_local_checkpoints_may_lie_at_home_here_in_the_temporary_folder_and_where_it_was_allowed(
    tmp_path: Path,
) -> None:
    stack = Stack(StackOptions(tmp_path, allowed_roots=(Path("/srv/models"),)), Settings())
    roots = json.loads(stack._environment()["BITMILL_ALLOWED_ROOTS"])
    assert {str(Path.home()), str(Path.cwd()), "/srv/models"} <= set(roots)
    assert "/" not in roots


def test_the_usual_port_gives_way_when_it_is_taken_and_a_chosen_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("cli.stack.time.sleep", lambda _: None)
        usual = Stack(StackOptions(tmp_path), Settings(port=port))
        assert usual._choose_port() not in (0, port)
        with pytest.raises(Conflict, match="is taken"):
            _stack(tmp_path, port=port)._choose_port()


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("example", "example")],
)
def test_the_url_is_one_that_this_machine_can_open(host: str, address: str) -> None:
    assert stack_module._address(host) == address


class Dying:
    """A service that never lives."""

    running = False

    def __init__(self) -> None:
        self.starts = 0

    def start(self) -> None:
        self.starts += 1

    def signal_stop(self) -> None: ...

    def stop(self) -> None: ...


def test_what_keeps_dying_is_started_again_ever_more_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(stack_module, "monotonic", lambda: now[0])
    stack, service = _stack(tmp_path), Dying()
    stack._add("dying", service)
    starts: list[float] = []
    while now[0] < 60:
        stack.supervise_once()
        starts += [now[0]] * (service.starts - 1 - len(starts))
        now[0] += 0.1
    gaps = [round(later - earlier) for earlier, later in itertools.pairwise(starts)]
    assert gaps == [1, 2, 4, 8, 15, 15]


def test_a_second_stack_on_a_folder_is_refused_and_leaves_the_url_of_the_first(tmp_path: Path) -> None:
    first = _stack(tmp_path)
    first._prepare()
    (first.data_dir / "url").write_text("http://127.0.0.1:1")
    with pytest.raises(Conflict), stack_module.running_stack(first.options, first.settings):
        pass
    assert (first.data_dir / "url").exists()
    first.stop()
    assert not (first.data_dir / "url").exists()
