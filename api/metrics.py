"""What Prometheus reads at `/metrics`: HTTP as this process saw it, the queue as the database knows it.

Numbers of the queue are read at most every few seconds, whoever asks. With the database away the numbers of HTTP are
still there, and `database_up` is 0.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import Engine

from core.clock import monotonic
from core.errors import BitmillError
from core.jobs.metrics import QueueMetrics, measure

_FRESH_S = 5.0


class Metrics:
    """The numbers of one API process, with a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "http_requests", "Requests answered.", ("method", "route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "http_request_seconds", "Time until the answer was sent.", ("method", "route"), registry=self.registry
        )
        self.sse_connections = Gauge("sse_connections", "Open event streams.", registry=self.registry)
        self.parts_in_flight = Gauge("upload_parts_in_flight", "Parts being received.", registry=self.registry)
        self.registry.register(QueueCollector(engine))

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)


class QueueCollector(Collector):
    """The queue's numbers, read from the database when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self._known: QueueMetrics | None = None
        self._read_at = float("-inf")

    def collect(self) -> Iterator[Metric]:
        found = self._fresh()
        yield GaugeMetricFamily("database_up", "Whether the database answers.", value=float(found is not None))
        if found is not None:
            yield from families(found)

    def _fresh(self) -> QueueMetrics | None:
        with self._lock:
            if monotonic() - self._read_at > _FRESH_S:
                try:
                    self._known = measure(self._engine)
                except BitmillError:
                    self._known = None
                self._read_at = monotonic()
            return self._known


def families(found: QueueMetrics) -> Iterator[Metric]:
    """The queue's numbers under the names that dashboards and alerts rely on."""
    yield CounterMetricFamily("jobs_submitted_total", "Jobs ever submitted.", value=sum(found.jobs.values()))
    jobs = GaugeMetricFamily("jobs", "Jobs by status.", labels=("status",))
    for status, count in found.jobs.items():
        jobs.add_metric((status,), count)
    depth = GaugeMetricFamily("queue_depth", "Ready steps by queue.", labels=("queue",))
    for queue, count in found.queue_depth.items():
        depth.add_metric((queue,), count)
    attempts = CounterMetricFamily("attempts_total", "Attempts that ended.", labels=("outcome", "error_code"))
    for (outcome, code), count in found.attempts.items():
        attempts.add_metric((outcome, code), count)
    steps = SummaryMetricFamily("step_seconds", "Time that steps took.", labels=("kind",))
    for kind, (count, seconds) in found.step_seconds.items():
        steps.add_metric((kind,), count, seconds)
    yield from (jobs, depth, attempts, steps)
    lost = sum(count for (outcome, _), count in found.attempts.items() if outcome == "lost")
    yield CounterMetricFamily("leases_expired_total", "Attempts whose lease ran out.", value=lost)
    yield GaugeMetricFamily("oldest_queued_seconds", "Age of the oldest queued job.", value=found.oldest_queued_s)
    yield CounterMetricFamily("artefact_bytes_total", "Bytes of published artefacts.", value=found.artefact_bytes)
    yield GaugeMetricFamily("workers_alive", "Workers that report.", value=found.workers_alive)
