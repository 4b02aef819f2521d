"""Commands that talk to a service or run one: `up`, `demo`, `submit` and `jobs ...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import AsJson, DataDir, Key, RecipeName, Set, Source, Url, overrides
from cli.output import DONE, FAILED, emit, say
from core.errors import Conflict, UserError

if TYPE_CHECKING:
    from cli.client import Client

Json = dict[str, Any]
JobId = Annotated[str, typer.Argument(help="A job's id.", metavar="JOB")]

jobs_app = typer.Typer(
    rich_markup_mode=None, help="Jobs of a service: list, show, watch, cancel, retry, download.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    app.command("up")(up)
    app.command("demo")(demo)
    app.command("submit")(submit)
    app.add_typer(jobs_app, name="jobs")


def up(
    data_dir: DataDir = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port to listen on; 0 takes any free one.")] = None,
    workers: Annotated[int, typer.Option("--workers", help="Worker processes.", min=0)] = 1,
    allow_root: Annotated[
        list[Path] | None,
        typer.Option("--allow-root", help="One more folder that local checkpoints may lie under (repeatable)."),
    ] = None,
) -> int:
    """Run the whole service on this machine; Ctrl-C stops it. State stays in the data folder."""
    from cli.stack import StackOptions, running_stack
    from core.config import Settings

    settings = Settings()
    folder = data_dir or settings.data_dir
    roots = tuple(allow_root or ())
    options = StackOptions(folder, host=host or settings.host, port=port, workers=workers, allowed_roots=roots)
    try:
        with running_stack(options, settings) as stack:
            print(stack.url, flush=True)
            say(f"ready; data and logs in {stack.data_dir}, key in {stack.data_dir / 'key'}; Ctrl-C stops")
            stack.run_until(lambda: False)
    except KeyboardInterrupt:
        say("stopped")
    return DONE


def demo(
    json: AsJson = False,
    model: Annotated[str, typer.Option("--model", help="bundled or smollm2.")] = "bundled",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the artefact.")] = None,
) -> int:
    """A real model through a service that is started for it."""
    from cli import demo as demonstration

    return demonstration.run(model, out, as_json=json)


def submit(
    source: Source,
    recipe: RecipeName,
    settings: Set = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the job to end.")] = False,
    name: Annotated[str, typer.Option("--name", help="A name for the job.")] = "",
    url: Url = None,
    key: Key = None,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> int:
    """Send a checkpoint and a recipe to a service."""
    from cli import render
    from cli.client import Client, find_connection
    from core.recipe.recipe import load_recipe

    chosen = load_recipe(recipe, overrides(settings))
    with Client(find_connection(url, key, data_dir)) as client:
        checkpoint = checkpoint_of(client, source)
        job = client.post("/v1/jobs", {"checkpoint": checkpoint, "recipe": chosen.canonical(), "name": name})
        say(f"submitted {job['id']}")
        if wait:
            job = watched(client, job["id"])
    if json:
        emit(job)
    elif wait:
        render.job(job)
    else:
        print(job["id"])
    return FAILED if wait and job["status"] != "succeeded" else DONE


def checkpoint_of(client: Client, source: str) -> str:
    """The id of the checkpoint that SOURCE names, registered or uploaded first where need be."""
    if source.startswith("ckpt_"):
        return source
    if source.startswith("hf:"):
        repo, _, revision = source.removeprefix("hf:").partition("@")
        named: Json = {"hf": {"repo": repo, "revision": revision or "main"}}
    elif source.startswith("s3://"):
        named = {"s3": {"url": source}}
    else:
        named = {"upload": uploaded(client, Path(source).expanduser())}
    checkpoint = client.post("/v1/checkpoints", {"source": named, "name": source[-200:]})
    return str(checkpoint["id"])


def uploaded(client: Client, folder: Path) -> str:
    """Send a folder; the id of the completed upload."""
    from cli import render, upload

    files = upload.collect(folder)
    total = sum(file.size for file in files)
    with render.bytes_progress("hashing", total) as hashed:
        files = upload.hash_files(files, hashed)
    client.patience_s = 60.0
    with render.bytes_progress("uploading", total) as sent:
        return upload.send(client, files, upload.Progress(sent=sent))


def watched(client: Client, job_id: str) -> Json:
    """Show a bar per step until the job ends; its last state."""
    from cli import render

    client.patience_s = 60.0
    with render.job_progress() as see:
        return client.watch(job_id, see)


def _client(url: str | None, key: str | None, data_dir: Path | None) -> Client:
    from cli.client import Client, find_connection

    return Client(find_connection(url, key, data_dir))


@jobs_app.command("list")
def list_jobs(
    status: Annotated[str | None, typer.Option("--status", help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=200)] = 50,
    cursor: Annotated[str | None, typer.Option("--cursor", help="Where the last page ended.")] = None,
    url: Url = None,
    key: Key = None,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """The jobs of this key's owner, newest first."""
    from cli import render

    with _client(url, key, data_dir) as client:
        page = client.get("/v1/jobs", status=status, limit=limit, cursor=cursor)
    if json:
        emit(page)
    else:
        render.jobs(page["items"])


@jobs_app.command("show")
def show_job(job: JobId, url: Url = None, key: Key = None, data_dir: DataDir = None, json: AsJson = False) -> None:
    """One job with its steps, numbers and, if it failed, the reason."""
    with _client(url, key, data_dir) as client:
        _show(client.job(job), as_json=json)


@jobs_app.command("watch")
def watch_job(job: JobId, url: Url = None, key: Key = None, data_dir: DataDir = None, json: AsJson = False) -> int:
    """A progress bar per step until the job ends."""
    with _client(url, key, data_dir) as client:
        state = watched(client, job)
    _show(state, as_json=json)
    return DONE if state["status"] == "succeeded" else FAILED


@jobs_app.command("cancel")
def cancel_job(job: JobId, url: Url = None, key: Key = None, data_dir: DataDir = None, json: AsJson = False) -> None:
    """Ask a job to stop."""
    with _client(url, key, data_dir) as client:
        _show(client.post(f"/v1/jobs/{job}/cancel"), as_json=json)


@jobs_app.command("retry")
def retry_job(job: JobId, url: Url = None, key: Key = None, data_dir: DataDir = None, json: AsJson = False) -> None:
    """Make a new job like a finished one; steps that are done are used again."""
    with _client(url, key, data_dir) as client:
        _show(client.post(f"/v1/jobs/{job}/retry"), as_json=json)


@jobs_app.command("download")
def download_job(
    job: JobId,
    out: Annotated[Path, typer.Option("--out", help="Folder for the artefact.", metavar="DIR")],
    url: Url = None,
    key: Key = None,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Fetch a job's artefact, verified; what an earlier attempt fetched is kept."""
    with _client(url, key, data_dir) as client:
        paths = downloaded(client, job, out)
    if json:
        emit({"job": job, "out": str(out), "files": paths})
    else:
        print(out)


def downloaded(client: Client, job: str, out: Path) -> list[str]:
    """Fetch all artefacts of a job into `out`; their paths relative to it."""
    from cli import render

    artefacts = client.get(f"/v1/jobs/{job}/artefacts")["items"]
    if not artefacts:
        raise Conflict("the job has no artefacts", where=job, hint="only a job whose export has run has some")
    if out.exists() and not out.is_dir():
        raise UserError("is not a folder", where=str(out))
    several = len({artefact["export"] for artefact in artefacts}) > 1
    client.patience_s = 60.0
    with render.bytes_progress("downloading", sum(artefact["size"] for artefact in artefacts)) as got:
        for artefact in artefacts:
            client.download(artefact, out / artefact["export"] if several else out, got)
    return [str(artefact["path"]) for artefact in artefacts]


def _show(job: Json, *, as_json: bool) -> None:
    from cli import render

    if as_json:
        emit(job)
    else:
        render.job(job)
