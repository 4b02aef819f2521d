"""Text of a public data set of the hub: `hf:ORG/NAME[:CONFIG][:SPLIT]`.

Read from the hub's own Parquet form of every data set (revision `refs/convert/parquet`, files
CONFIG/SPLIT/NNNN.parquet), so no code of the data set runs. Documents are the column `text`, else the first column of
strings, in order, up to a limit. Without SPLIT calibration reads `train`; evaluation `test` or `validation` where there
is one. The hub may serve other rows tomorrow: the sha256 of the windows that were used stands in the manifest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from core.errors import NotFound, StoreUnavailable, UserError

REVISION = "refs/convert/parquet"
MAX_CHARACTERS = 64 << 20
_PREFERRED = {"calibration": ("train",), "evaluation": ("test", "validation", "train")}
_ROWS = 1024


def dataset_text(text: str, split: str, limit: int = MAX_CHARACTERS) -> str:
    """Documents of the data set, an empty line between them; about `limit` characters at most.

    NotFound for a data set, configuration or split that there is not, UserError for one without text, StoreUnavailable
    when the hub does not answer.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    repo, *asked = text.removeprefix("hf:").split(":")
    try:
        files = HfApi().list_repo_files(repo, repo_type="dataset", revision=REVISION)
        parts, size = [], 0
        for shard in choose(files, asked, split, text):
            path = hf_hub_download(repo, shard, repo_type="dataset", revision=REVISION)
            for document in documents(Path(path), text):
                parts.append(document)
                size += len(document)
                if size >= limit:
                    return "\n\n".join(parts)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise NotFound("no such data set, or not a public one", where=text) from error
    except (HfHubHTTPError, OSError) as error:
        raise StoreUnavailable(f"the hub did not answer: {error}"[:500], where=text) from error
    return "\n\n".join(parts)


def choose(files: Sequence[str], asked: Sequence[str], split: str, where: str) -> list[str]:
    """The Parquet files of the configuration and split that were asked for, in order. One name may be either."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(files):
        parts = path.split("/")
        if len(parts) == 3 and path.endswith(".parquet"):
            found[parts[0]][parts[1].removeprefix("partial-")].append(path)
    if not found:
        raise NotFound("the hub has no Parquet form of this data set", where=where)
    names = list(asked)
    config = names.pop(0) if names and names[0] in found else ("default" if "default" in found else min(found))
    wanted = tuple(names) or _PREFERRED[split]
    chosen = next((name for name in wanted if name in found[config]), None)
    if chosen is None:
        there = ", ".join(f"{one}:{part}" for one in sorted(found) for part in sorted(found[one]))
        raise NotFound(f"no {' or '.join(wanted)} in {config}", where=where, hint=f"there are {there}"[:500])
    return found[config][chosen]


def documents(path: Path, where: str) -> Iterator[str]:
    """The texts of a Parquet file."""
    from pyarrow import ArrowInvalid, parquet

    try:
        file = parquet.ParquetFile(path)
        column = _text_column(file.schema_arrow, where)
        for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
            yield from (row for row in batch.column(0).to_pylist() if row)
    except ArrowInvalid as error:
        raise UserError(f"the hub's Parquet file cannot be read: {error}"[:300], where=where) from error


def _text_column(schema: Any, where: str) -> str:
    from pyarrow import types

    strings = [field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
    if not strings:
        raise UserError(f"has no column of text, only {', '.join(schema.names)}"[:300], where=where)
    return "text" if "text" in strings else str(strings[0])
