"""SQL of uploads and the parts that have arrived."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, column, func, select, true, update
from sqlalchemy.dialects.postgresql import JSONB, insert

from core.errors import NotFound
from core.jobs.sessions import ReadSession, WriteSession
from core.jobs.tables import Upload, UploadPart


def get(session: ReadSession, owner: str, upload_id: str) -> Upload:
    found = session.scalar(select(Upload).where(Upload.id == upload_id, Upload.owner == owner))
    if found is None:
        raise NotFound("no such upload", where=upload_id)
    return found


def hold(session: WriteSession, owner: str, upload_id: str) -> Upload:
    """The upload, whose state does not change before this transaction ends."""
    get(session, owner, upload_id)
    query = select(Upload).where(Upload.id == upload_id).with_for_update(read=True)
    return session.scalars(query.execution_options(populate_existing=True)).one()


def parts(session: ReadSession, upload_id: str) -> dict[tuple[int, int], UploadPart]:
    """The parts that have arrived by (file number, part number)."""
    rows = session.scalars(select(UploadPart).where(UploadPart.upload_id == upload_id))
    return {(part.file_no, part.number): part for part in rows}


def put_part(
    session: WriteSession, upload_id: str, file_no: int, number: int, size: int, sha256: str, key: str
) -> str | None:
    """Note an arrived part, in place of an earlier one; the key of the one replaced, if it was another object."""
    place = (UploadPart.upload_id == upload_id, UploadPart.file_no == file_no, UploadPart.number == number)
    before = session.scalar(select(UploadPart.key).where(*place))
    values = {"size": size, "sha256": sha256, "key": key}
    statement = insert(UploadPart).values(upload_id=upload_id, file_no=file_no, number=number, **values)
    session.execute(
        statement.on_conflict_do_update(
            index_elements=[UploadPart.upload_id, UploadPart.file_no, UploadPart.number],
            set_={**values, "arrived_at": func.clock_timestamp()},
        )
    )
    return before if before is not None and before != key else None


def finish(session: WriteSession, upload_id: str, state: str, **values: Any) -> bool:
    """End an open upload; False when it is not open any more."""
    done = session.execute(
        update(Upload)
        .where(Upload.id == upload_id, Upload.state == "open")
        .values(state=state, **values)
        .execution_options(synchronize_session=False)
    )
    return int(done.rowcount) == 1  # type: ignore[attr-defined]


def expired(session: ReadSession, limit: int) -> list[Upload]:
    """Open uploads whose time is over, by the database's clock."""
    query = select(Upload).where(Upload.state == "open", Upload.expires_at < func.clock_timestamp())
    return list(session.scalars(query.order_by(Upload.expires_at).limit(limit)))


def open_bytes(session: ReadSession, owner: str) -> int:
    """Bytes that have arrived for open uploads of the owner."""
    query = select(func.coalesce(func.sum(UploadPart.size), 0)).join(Upload, Upload.id == UploadPart.upload_id)
    return int(session.scalar(query.where(Upload.owner == owner, Upload.state == "open")) or 0)


def promised_bytes(session: ReadSession, owner: str) -> int:
    """Bytes of all files of the owner's open uploads, arrived or not."""
    files = func.jsonb_array_elements(Upload.files).table_valued(column("value", JSONB))
    size = files.c.value["size"].astext.cast(BigInteger)
    query = select(func.coalesce(func.sum(size), 0)).select_from(Upload).join(files, true())
    return int(session.scalar(query.where(Upload.owner == owner, Upload.state == "open")) or 0)
