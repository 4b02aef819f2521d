"""What people see: tables on stdout, progress on stderr. Knows the JSON of the service and of the pipeline, no more."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

Json = dict[str, Any]

_UNITS = ("B", "kB", "MB", "GB", "TB")
_SUMMARY = (
    ("bits_per_param", "bits per parameter", "{:.4f}"),
    ("size_bytes", "size of the weights", "{}"),
    ("kl_mean", "KL divergence, measured (nats/token)", "{:.6f}"),
    ("predicted_kl", "KL divergence, predicted", "{:.6f}"),
    ("perplexity", "perplexity, quantised", "{:.4f}"),
    ("reference_perplexity", "perplexity, original", "{:.4f}"),
)


def out() -> Console:
    return Console(file=sys.stdout, highlight=False, soft_wrap=True)


def err() -> Console:
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def size(count: float) -> str:
    """A number of bytes as people write it (powers of 1000)."""
    value = float(count)
    for unit in _UNITS[:-1]:
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} {_UNITS[-1]}"


def table(columns: Iterable[str], rows: Iterable[Iterable[object]], title: str = "") -> None:
    shown = Table(*columns, title=title or None, title_justify="left")
    for row in rows:
        shown.add_row(*(("" if value is None else str(value)) for value in row))
    out().print(shown)


def summary(title: str, values: Json, extra: Iterable[tuple[str, str]] = ()) -> None:
    """The numbers of a finished job; what was not measured is left out."""
    rows = [*extra]
    for name, label, form in _SUMMARY:
        if values.get(name) is not None:
            rows.append((label, size(values[name]) if name == "size_bytes" else form.format(values[name])))
    table(("", ""), rows, title)


def job(job: Json) -> None:
    out().print(f"{job['id']}  {job['status']}  {job.get('name') or ''}".rstrip())
    steps = [
        (step_name(step), step["status"], f"{100 * step['progress']:.0f} %", step["attempts"]) for step in job["steps"]
    ]
    table(("step", "status", "progress", "attempts"), steps)
    if job.get("failure"):
        failure(job["failure"])
    if job.get("summary"):
        summary("summary", job["summary"])


def failure(details: Json) -> None:
    """Why a job failed, on stderr."""
    place = details.get("tensor") or details.get("where") or ""
    err().print(f"failed in {details['step']}: {details['code']}: {place + ': ' if place else ''}{details['detail']}")
    if details.get("hint"):
        err().print(f"hint: {details['hint']}")


def jobs(items: Iterable[Json]) -> None:
    rows = [
        (item["id"], item["status"], f"{100 * item['progress']:.0f} %", item["created_at"], item.get("name", ""))
        for item in items
    ]
    table(("job", "status", "progress", "created", "name"), rows)


def keys(items: Iterable[Json]) -> None:
    rows = [
        (item["id"], item["prefix"], " ".join(item["scopes"]), item["created_at"], item["revoked_at"] or "")
        for item in items
    ]
    table(("key", "begins with", "scopes", "created", "revoked"), rows)


def webhooks(items: Iterable[Json]) -> None:
    rows = [
        (item["id"], item["url"], " ".join(item["kinds"]), item["failing_since"] or "", item["disabled_reason"] or "")
        for item in items
    ]
    table(("webhook", "url", "kinds", "failing since", "disabled"), rows)


def deliveries(items: Iterable[Json]) -> None:
    rows = [
        (item["id"], item["kind"], item["job"], item["state"], item["attempts"], item["next_at"], item["last_error"])
        for item in items
    ]
    table(("delivery", "kind", "job", "state", "attempts", "next attempt", "last error"), rows)


def step_name(step: Json) -> str:
    return f"{step['kind']} {step['index']}" if step["kind"] == "quantise" else str(step["kind"])


@contextmanager
def bytes_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for a transfer of `total` bytes; call what it yields with every number of bytes done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err()) as shown:
        task = shown.add_task(label, total=total)
        yield lambda count: shown.advance(task, count)


@contextmanager
def job_progress() -> Iterator[Callable[[Json], None]]:
    """A bar per step of a job; call what it yields with every new state of the job."""
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=err()) as shown:

        def see(state: Json) -> None:
            for step in state["steps"]:
                name = step_name(step)
                if name not in tasks:
                    tasks[name] = shown.add_task(name, total=1.0, state="", start=False)
                _show_step(shown, tasks[name], step)

        yield see


def _show_step(shown: Progress, task: TaskID, step: Json) -> None:
    status = str(step["status"])
    if status not in ("blocked", "ready"):
        shown.start_task(task)
    again = f" (attempt {step['attempts']})" if step["attempts"] > 1 else ""
    message = f" {step['message']}" if step.get("message") and status == "running" else ""
    done = 1.0 if status in ("succeeded", "reused") else float(step["progress"])
    shown.update(task, completed=done, state=status + again + message)
    if status in ("succeeded", "reused", "failed", "cancelled"):
        shown.stop_task(task)


@contextmanager
def work_progress(label: str) -> Iterator[Callable[[float, str], None]]:
    """A bar for work in this process; call what it yields with (0..1, what is being done)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"), TimeElapsedColumn())
    with Progress(*columns, console=err()) as shown:
        task = shown.add_task(label, total=1.0, what="")
        yield lambda done, what: shown.update(task, completed=done, what=what)


def plan(planned: Json) -> None:
    """An allocation: the forecast, then a line per tensor."""
    numbers = {name: value for name, value in planned.items() if not isinstance(value, (list, dict))}
    table(("", ""), numbers.items(), "forecast")
    _tensors(planned.get("tensors", []))


def inspection(found: Json) -> None:
    """A checkpoint or an artefact: its totals, then a line per tensor."""
    numbers = {name: value for name, value in found.items() if not isinstance(value, (list, dict))}
    table(("", ""), numbers.items())
    for group in found.get("fused_groups", []):
        out().print("fused: " + ", ".join(group))
    for item in found.get("unsupported", []):
        out().print(f"not supported: {item['what']}: {item['why']}")
    if isinstance(found.get("tensors"), list):
        _tensors(found["tensors"])


def _tensors(tensors: list[Json]) -> None:
    if tensors:
        columns = [name for name, value in tensors[0].items() if not isinstance(value, dict)]
        table(columns, ([_cell(tensor.get(name)) for name in columns] for tensor in tensors))


def _cell(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    return " x ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def catalogue(items: Any) -> None:
    """A catalogue: a list of dictionaries, or a dictionary of them by name."""
    listed = [{"name": name, **item} for name, item in items.items()] if isinstance(items, dict) else list(items)
    columns = ("name", "description")
    table(columns, ([item.get(column, "") for column in columns] for item in listed))
