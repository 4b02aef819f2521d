"""What every object store promises, checked on a folder and on a real S3 server."""

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from cli.servers import S3Endpoint, seaweed
from core.config import Settings
from core.errors import DigestMismatch, NotFound, OutOfDisk, PathNotAllowed, StoreUnavailable, UserError
from core.storage import s3_store
from core.storage.local_store import LocalStore
from core.storage.object_store import ObjectStore, open_store, validate_key
from core.storage.s3_store import S3Store

pytestmark = pytest.mark.xdist_group("s3")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    with seaweed(tmp_path_factory.mktemp("weed")) as endpoint:
        s3_store.make_client(_settings(endpoint), endpoint.url).create_bucket(Bucket="bitmill")
        yield endpoint


def _settings(endpoint: S3Endpoint, store_url: str = "s3://bitmill/unit") -> Settings:
    return Settings(
        store_url=store_url,
        s3_endpoint=endpoint.url,
        s3_access_key=endpoint.access_key,
        s3_secret_key=endpoint.secret_key,
    )


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return open_store(Settings(store_url=f"file://{tmp_path}/objects"))
    prefix = hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
    return open_store(_settings(request.getfixturevalue("endpoint"), f"s3://bitmill/{prefix}"))


def test_bytes_come_back_as_they_went_in(store: ObjectStore) -> None:
    assert store.put_bytes("a/b.bin", b"hello") == 5
    assert store.read("a/b.bin") == b"hello"
    assert store.size("a/b.bin") == 5


def test_an_empty_object_is_an_object(store: ObjectStore) -> None:
    assert store.put_bytes("empty", b"") == 0
    assert store.size("empty") == 0
    assert store.read("empty") == b""
    assert list(store.stream("empty")) == []


def test_a_key_is_written_once_and_the_first_bytes_stay(store: ObjectStore, tmp_path: Path) -> None:
    store.put_bytes("k", b"first")
    assert store.put_bytes("k", b"second!") == 5
    (tmp_path / "third").write_bytes(b"the third")
    assert store.put_file("k", tmp_path / "third") == 5
    assert store.read("k") == b"first"


def test_two_writers_of_one_key_both_succeed_and_one_wins(store: ObjectStore) -> None:
    payloads = [bytes([number]) * 100_000 for number in range(6)]
    writers = [threading.Thread(target=store.put_bytes, args=("race", data)) for data in payloads]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert store.read("race") in payloads


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(0, 4, b"0123"), (3, None, b"3456789"), (8, 10, b"89"), (10, 5, b""), (99, None, b""), (2, 0, b"")],
)
def test_ranges_end_where_the_object_ends(store: ObjectStore, start: int, length: int | None, expected: bytes) -> None:
    store.put_bytes("digits", b"0123456789")
    assert store.read("digits", start, length) == expected
    assert b"".join(store.stream("digits", start, length, chunk=3)) == expected


def test_a_stream_has_pieces_of_at_most_the_chunk(store: ObjectStore) -> None:
    data = os.urandom(100_000)
    store.put_bytes("s", data)
    pieces = list(store.stream("s", 1, chunk=4096))
    assert b"".join(pieces) == data[1:]
    assert max(map(len, pieces)) <= 4096


def test_a_file_is_stored_when_its_digest_is_the_promised_one(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"weights")
    assert store.put_file("f", tmp_path / "f", hashlib.sha256(b"weights").hexdigest()) == 7
    assert store.read("f") == b"weights"


def test_a_wrong_digest_leaves_nothing(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"weights")
    with pytest.raises(DigestMismatch, match="promised"):
        store.put_file("f", tmp_path / "f", "0" * 64)
    assert store.size("f") is None
    assert list(store.list("")) == []


def test_a_large_file_goes_in_parts_and_comes_back_whole(store: ObjectStore, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 37 + b"tail"
    (tmp_path / "big").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    assert store.put_file("big", tmp_path / "big", digest) == len(data)
    assert hashlib.sha256(store.read("big")).hexdigest() == digest
    assert store.read("big", 17_000_000, 1000) == data[17_000_000:17_001_000]


def test_a_large_file_with_a_wrong_digest_leaves_nothing(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(20 << 20))
    with pytest.raises(DigestMismatch):
        store.put_file("big", tmp_path / "big", "0" * 64)
    assert store.size("big") is None


def test_an_absent_key_is_not_found_everywhere(store: ObjectStore) -> None:
    assert store.size("no/such") is None
    assert store.local_path("no/such") is None
    store.delete("no/such")
    with pytest.raises(NotFound):
        store.read("no/such")
    with pytest.raises(NotFound):
        store.stream("no/such")


def test_a_listing_holds_every_key_with_the_prefix_once(store: ObjectStore) -> None:
    keys = ["a/b/c", "a/b.c", "a/b-c", "a/bc/d", "ab", "b"]
    for key in keys:
        store.put_bytes(key, key.encode())
    assert sorted(store.list("")) == [(key, len(key)) for key in sorted(keys)]
    assert sorted(key for key, _ in store.list("a/b")) == ["a/b-c", "a/b.c", "a/b/c", "a/bc/d"]
    assert [key for key, _ in store.list("a/b/")] == ["a/b/c"]
    assert list(store.list("c")) == []


def test_a_deleted_object_is_gone_and_can_be_put_again(store: ObjectStore) -> None:
    store.put_bytes("x/y/z", b"1")
    store.delete("x/y/z")
    assert store.size("x/y/z") is None
    store.put_bytes("x/y/z", b"22")
    assert store.read("x/y/z") == b"22"


HOSTILE = ["", "/etc/passwd", "a/../b", "..", "a//b", "a/", "./a", "a\\b", "a\nb", ".tmp/x", "a/" + "b" * 256, "a\x00b"]


@pytest.mark.parametrize("key", HOSTILE)
def test_a_key_that_could_leave_the_store_is_refused(store: ObjectStore, key: str) -> None:
    for use in (store.read, store.size, store.delete, store.local_path):
        with pytest.raises(PathNotAllowed):
            use(key)
    with pytest.raises(PathNotAllowed):
        store.put_bytes(key, b"x")


def test_names_beyond_ascii_are_keys_too(store: ObjectStore) -> None:
    store.put_bytes("checkpoints/größe +%20&.json", b"1")
    assert [key for key, _ in store.list("checkpoints/")] == ["checkpoints/größe +%20&.json"]
    assert store.read("checkpoints/größe +%20&.json") == b"1"


def test_a_url_that_names_no_store_is_refused() -> None:
    for url in ("http://x/y", "file://host/x", "file:relative", "s3:///x"):
        with pytest.raises(UserError, match="not the URL"):
            open_store(Settings(store_url=url))


class TestFolder:
    """What only the folder has to promise."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(tmp_path / "objects")

    def test_a_link_to_a_file_outside_is_not_followed(self, store: LocalStore, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("secret")
        store.put_bytes("a/b", b"1")
        (store.root / "a" / "link").symlink_to(tmp_path / "secret")
        with pytest.raises(PathNotAllowed):
            store.read("a/link")
        assert [key for key, _ in store.list("")] == ["a/b"]

    def test_a_link_to_a_folder_outside_is_not_entered(self, store: LocalStore, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "x").write_text("x")
        store.put_bytes("a", b"1")
        (store.root / "dir").symlink_to(outside)
        with pytest.raises((PathNotAllowed, NotFound)):
            store.read("dir/x")
        with pytest.raises(PathNotAllowed):
            store.put_bytes("dir/y", b"y")
        assert sorted(path.name for path in outside.iterdir()) == ["x"]

    def test_nothing_is_visible_before_it_is_complete(self, store: LocalStore, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(b"weights")
        with pytest.raises(DigestMismatch):
            store.put_file("f", tmp_path / "f", "0" * 64)
        assert [path for path in store.root.rglob("*") if path.is_file()] == []

    def test_a_full_disk_has_its_own_error(self, monkeypatch: pytest.MonkeyPatch, store: LocalStore) -> None:
        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OutOfDisk):
            store.put_bytes("a", b"1")
        monkeypatch.undo()
        assert store.size("a") is None

    def test_an_object_has_a_path_and_no_url(self, store: LocalStore) -> None:
        store.put_bytes("a/b", b"1")
        path = store.local_path("a/b")
        assert path is not None
        assert path.read_bytes() == b"1"
        assert store.presigned_url("a/b", 60, "b") is None
        assert store.presigned_put_url("a/c", 1, 60) is None


class TestS3:
    """What only S3 has to promise."""

    @pytest.fixture
    def store(self, endpoint: S3Endpoint) -> S3Store:
        store = open_store(_settings(endpoint))
        assert isinstance(store, S3Store)
        return store

    def test_a_presigned_url_serves_ranges_under_the_file_name(self, store: S3Store) -> None:
        import httpx

        store.put_bytes("artefact", b"0123456789")
        url = store.presigned_url("artefact", 60, "größe 1.safetensors")
        answer = httpx.get(str(url), headers={"Range": "bytes=2-4"})
        assert (answer.status_code, answer.content) == (206, b"234")
        assert "gr%C3%B6%C3%9Fe%201.safetensors" in answer.headers["content-disposition"]

    def test_a_presigned_put_accepts_the_promised_bytes(self, store: S3Store) -> None:
        import httpx

        url = store.presigned_put_url("part-1", 5, 60)
        assert httpx.put(str(url), content=b"hello").status_code == 200
        assert store.read("part-1") == b"hello"

    def test_a_presigned_put_refuses_another_size(self, store: S3Store) -> None:
        import httpx

        url = store.presigned_put_url("part-2", 5, 60)
        assert httpx.put(str(url), content=b"hello world").status_code == 403
        assert store.size("part-2") is None

    def test_a_server_that_is_not_there_is_unavailable(self, endpoint: S3Endpoint) -> None:
        settings = _settings(S3Endpoint("http://127.0.0.1:9", "a", "b"))
        with pytest.raises(StoreUnavailable):
            open_store(settings).read("x")

    def test_wrong_credentials_say_which_settings_to_check(self, endpoint: S3Endpoint) -> None:
        store = open_store(_settings(S3Endpoint(endpoint.url, "bitmill", "wrong")))
        with pytest.raises(StoreUnavailable) as caught:
            store.put_bytes("x", b"1")
        assert "BITMILL_S3" in caught.value.hint

    def test_a_missing_bucket_is_named_in_the_hint(self, endpoint: S3Endpoint) -> None:
        settings = _settings(endpoint, "s3://no-such-bucket")
        with pytest.raises(StoreUnavailable) as caught:
            list(open_store(settings).list(""))
        assert "bucket" in caught.value.hint

    def test_a_body_that_breaks_off_is_resumed_where_it_broke(
        self, monkeypatch: pytest.MonkeyPatch, store: S3Store
    ) -> None:
        data = os.urandom(300_000)
        store.put_bytes("resumed", data)
        real, calls = store._open_range, []

        class Broken:
            def __init__(self, body: object) -> None:
                self.body = body

            def iter_chunks(self, chunk: int) -> Iterator[bytes]:
                yield next(iter(self.body.iter_chunks(chunk)))  # type: ignore[attr-defined]
                raise ConnectionResetError("broken off")

        def flaky(key: str, start: int, end: int) -> object:
            calls.append(start)
            body = real(key, start, end)
            return Broken(body) if len(calls) < 3 else body

        monkeypatch.setattr(store, "_open_range", flaky)
        assert store.read("resumed") == data
        assert len(calls) in (1, 2, 3)

    def test_the_whole_of_a_terabyte_fits_into_the_allowed_parts(self) -> None:
        size = 1 << 40
        assert -(-size // s3_store.part_size(size)) <= 10_000
        assert s3_store.part_size(1) == 16 << 20

    def test_credentials_may_come_from_the_environment(
        self, monkeypatch: pytest.MonkeyPatch, endpoint: S3Endpoint
    ) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", endpoint.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", endpoint.secret_key)
        assert boto3.session.Session().get_credentials() is not None
        store = open_store(Settings(store_url="s3://bitmill/env", s3_endpoint=endpoint.url))
        assert store.put_bytes("x", b"1") == 1


def test_a_valid_key_is_returned_unchanged() -> None:
    assert validate_key("steps/ab/cd-model.safetensors") == "steps/ab/cd-model.safetensors"
