"""Settings, read from `BITMILL_*` in a `main()` and passed down; never a module-level object.

One frozen group. `BITMILL_DATABASE_URL`, `BITMILL_BROKER_URL` and `BITMILL_STORE_URL` point the three servers anywhere;
the embedded stack fills in what is not set. Durations are seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Everything a process of Bitmill may be told from outside."""

    model_config = SettingsConfigDict(env_prefix="BITMILL_", frozen=True, extra="ignore")

    # the three servers; store: file:///abs/folder or s3://bucket/prefix
    database_url: str = ""
    broker_url: str = ""
    store_url: str = ""
    s3_endpoint: str = ""
    s3_public_endpoint: str = ""  # what a client outside can reach, for presigned URLs
    s3_region: str = "us-east-1"
    s3_access_key: str = ""
    s3_secret_key: str = ""

    # this machine
    data_dir: Path = Path.home() / ".local" / "share" / "bitmill"
    scratch_dir: Path | None = None  # default: data_dir / "scratch"
    allowed_roots: tuple[Path, ...] = ()  # folders that `{path: ...}` sources may lie under; () refuses all
    host: str = "127.0.0.1"
    port: int = 8642
    log_format: Literal["json", "console"] = "json"

    # the queue
    lease_s: float = 60.0
    heartbeat_s: float = 10.0
    reconcile_s: float = 15.0
    redispatch_s: float = 30.0
    max_attempts: int = 3
    shard_bytes: int = 1 << 30  # source bytes per quantise step
    engine_grace_s: float = 10.0

    # what is kept, and for how long
    sweep_s: float = 3600.0
    sweep_grace_s: float = 86_400.0  # an object younger than this is never removed
    keep_results_days: float = 30.0  # of steps, for reuse after their job; complete uploads without a checkpoint
    keep_answers_days: float = 7.0  # answers remembered under an Idempotency-Key
    keep_logs_days: float = 90.0  # lines of attempts' logs, and events of steps
    metrics_port: int = 0  # where the reconciler answers Prometheus; 0: nowhere

    # the worker
    device: str = "auto"  # auto | cpu | cuda
    queue: str = "cpu,gpu"
    threads: int = 0  # 0: all cores of the machine, also when several workers share it

    # access
    bootstrap_key: str = ""  # an admin key that exists from the start; the embedded stack makes one
    auth: Literal["required", "off"] = "required"
    max_upload_bytes: int = 2 << 40
    max_queued_jobs: int = 1000
    min_free_disk_bytes: int = 256 << 20

    # webhooks
    allow_private_webhooks: bool = False  # http, and addresses of private networks and of this machine
    max_webhooks: int = 20  # of one owner
    webhook_poll_s: float = 2.0  # between looks at what is due
    webhook_disable_s: float = 5 * 86400.0  # of nothing but failures, after which a webhook is disabled
    webhook_log_s: float = 30 * 86400.0  # how long ended deliveries are listed

    @property
    def scratch(self) -> Path:
        return self.scratch_dir or self.data_dir / "scratch"
