"""Webhooks: written down with the change they tell of, signed by the standard, sent at least once, given up in the end.

Signatures are verified by the standard's own library; receivers are real HTTP servers. Time passes by moving the
database's rows, never by waiting.
"""

from __future__ import annotations

import base64
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError
from standardwebhooks import Webhook as Standard

from cli.processes import Child
from core.config import Settings
from core.errors import Conflict, NotFound, QuotaExceeded
from core.jobs import lifecycle
from core.jobs.deliveries import SCHEDULE, Deliverer
from core.jobs.outgoing import AddressRefused
from core.jobs.repository import jobs as job_rows
from core.jobs.repository import webhooks as webhook_rows
from core.jobs.requests import NewWebhook, SubmitJob
from core.jobs.sessions import writing
from core.jobs.views import DeliveryView, JobView, WebhookKind
from core.jobs.webhooks import MadeWebhook, WebhookService
from tests.service.receiver import Received, Receiver, receiving

if TYPE_CHECKING:
    from tests.service.conftest import Bench

ALL: tuple[WebhookKind, ...] = NewWebhook(url="").kinds


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"allow_private_webhooks": True, "webhook_poll_s": 0.05})


@pytest.fixture
def service(engine: Engine, settings: Settings) -> WebhookService:
    return WebhookService(engine, settings)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture
def deliverer(engine: Engine, settings: Settings) -> Deliverer:
    return Deliverer(engine, settings)


@pytest.fixture
def made(service: WebhookService, receiver: Receiver) -> MadeWebhook:
    """A webhook of Ada's that hears of everything."""
    return service.create("ada", NewWebhook(url=receiver.url))


def deliver_all(deliverer: Deliverer) -> None:
    while deliverer.run_once():
        pass


def become_due(engine: Engine) -> None:
    """As if every wait were over, leases too."""
    with engine.begin() as connection:
        connection.execute(text("UPDATE webhook_delivery SET next_at = clock_timestamp() WHERE state = 'pending'"))


def verified(made: MadeWebhook, got: Received) -> dict[str, Any]:
    """The message of a request whose signature the standard's library has verified."""
    message: dict[str, Any] = Standard(made.secret).verify(got.body, got.headers)
    return message


def logged(service: WebhookService, made: MadeWebhook) -> list[DeliveryView]:
    """The webhook's log, oldest first."""
    return list(reversed(service.deliveries("ada", made.view.id).items))


def cancelled(bench: Bench, job: JobView) -> None:
    bench.jobs.cancel("ada", job.id)


def expired(bench: Bench, job: JobView) -> None:
    with bench.jobs.change() as change:
        lifecycle.expire(change, job_rows.lock(change.session, job.id))


def failed(bench: Bench, job: JobView) -> None:
    bench.queue.fail(bench.claim(job, "fetch").attempt_id, NotFound("no such file"))


class TestWhatIsTold:
    """Which events, of which jobs, to whom, and in what form."""

    def test_a_job_tells_that_it_began_and_how_it_ended_as_it_was_then(
        self, bench: Bench, made: MadeWebhook, receiver: Receiver, deliverer: Deliverer, service: WebhookService
    ) -> None:
        job = bench.work_off(bench.submit())
        deliver_all(deliverer)
        messages = [verified(made, got) for got in receiver.received]
        assert [message["type"] for message in messages] == ["job.started", "job.succeeded"]
        assert [message["data"]["status"] for message in messages] == ["running", "succeeded"]
        assert [message["data"]["finished_at"] is None for message in messages] == [True, False]
        assert JobView.model_validate(messages[1]["data"]) == job
        at = {event.kind: event.at for event in bench.jobs.events("ada", job.id)}
        assert [message["timestamp"] for message in messages] == [
            at[message["type"]].isoformat().replace("+00:00", "Z") for message in messages
        ]
        assert {got.headers["content-type"] for got in receiver.received} == {"application/json"}
        log = logged(service, made)
        assert [(row.state, row.attempts, row.last_status, row.next_at) for row in log] == [
            ("delivered", 1, 200, None)
        ] * 2
        assert [row.id for row in log] == [got.headers["webhook-id"] for got in receiver.received]

    @pytest.mark.parametrize(
        ("end", "kinds"),
        [
            (cancelled, ["job.cancelled"]),
            (expired, ["job.expired"]),
            (failed, ["job.started", "job.failed"]),
        ],
    )
    def test_every_end_of_a_job_is_told(
        self, bench: Bench, made: MadeWebhook, service: WebhookService, end: Callable[..., Any], kinds: list[str]
    ) -> None:
        end(bench, bench.submit())
        assert [row.kind for row in logged(service, made)] == kinds

    def test_a_job_that_is_done_at_once_tells_both_with_the_same_numbers(
        self, bench: Bench, made: MadeWebhook, service: WebhookService
    ) -> None:
        checkpoint = bench.checkpoint()
        bench.work_off(bench.submit(checkpoint))
        again = bench.submit(checkpoint)
        assert again.status == "succeeded"
        assert [row.kind for row in logged(service, made) if row.job == again.id] == ["job.started", "job.succeeded"]

    def test_only_the_chosen_kinds_are_told(self, bench: Bench, service: WebhookService, receiver: Receiver) -> None:
        made = service.create("ada", NewWebhook(url=receiver.url, kinds=("job.failed", "job.succeeded", "job.failed")))
        assert made.view.kinds == ("job.failed", "job.succeeded")
        bench.work_off(bench.submit())
        assert [row.kind for row in logged(service, made)] == ["job.succeeded"]

    def test_a_job_tells_all_to_the_webhook_that_it_names_and_once_only(
        self, bench: Bench, service: WebhookService, made: MadeWebhook, receiver: Receiver
    ) -> None:
        quiet = service.create("ada", NewWebhook(url=receiver.url, kinds=()))
        named = bench.submit(webhook=quiet.view.id)
        assert named.webhook == quiet.view.id
        bench.work_off(named)
        bench.work_off(bench.submit(webhook=made.view.id))
        assert [(row.kind, row.job) for row in logged(service, quiet)] == [
            ("job.started", named.id),
            ("job.succeeded", named.id),
        ]
        assert len(logged(service, made)) == 4

    def test_a_retry_names_the_same_webhook_while_it_is_there(
        self, bench: Bench, service: WebhookService, made: MadeWebhook
    ) -> None:
        job = bench.submit(webhook=made.view.id)
        bench.jobs.cancel("ada", job.id)
        assert bench.jobs.retry("ada", job.id).job.webhook == made.view.id
        service.delete("ada", made.view.id)
        assert bench.jobs.retry("ada", job.id).job.webhook is None
        assert bench.now(job).webhook == made.view.id

    def test_other_owners_hear_nothing(self, bench: Bench, service: WebhookService, made: MadeWebhook) -> None:
        bench.work_off(bench.submit(owner="eve"))
        assert logged(service, made) == []

    def test_a_plan_is_nobodys_news(self, bench: Bench, service: WebhookService, made: MadeWebhook) -> None:
        checkpoint = bench.checkpoint()
        job = bench.work_off(bench.submit(checkpoint))
        before = logged(service, made)
        planned = bench.jobs.plan("ada", SubmitJob(checkpoint=checkpoint, recipe=job.recipe))
        assert planned.status == "succeeded"
        assert logged(service, made) == before

    def test_a_change_that_is_taken_back_was_never_told(
        self, bench: Bench, service: WebhookService, made: MadeWebhook
    ) -> None:
        job = bench.submit()

        def expire_and_break() -> None:
            with bench.jobs.change() as change:
                lifecycle.expire(change, job_rows.lock(change.session, job.id))
                raise RuntimeError

        with pytest.raises(RuntimeError):
            expire_and_break()
        assert logged(service, made) == []


class TestAWebhook:
    """Registered, tested, deleted; of one owner only."""

    def test_its_secret_is_of_the_standards_form_and_told_once(
        self, made: MadeWebhook, service: WebhookService, engine: Engine
    ) -> None:
        assert made.secret.startswith("whsec_")
        assert len(base64.b64decode(made.secret.removeprefix("whsec_"), validate=True)) == 32
        assert made.secret not in str(service.get("ada", made.view.id)) + str(service.list("ada"))
        service.delete("ada", made.view.id)
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT secret FROM webhook")) == "", "nobody needs it any more"

    def test_is_of_its_owner(self, made: MadeWebhook, service: WebhookService, bench: Bench) -> None:
        for call in (service.get, service.delete, service.ping, service.deliveries):
            with pytest.raises(NotFound):
                call("eve", made.view.id)
        assert service.list("eve").items == ()
        with pytest.raises(NotFound):
            bench.submit(owner="eve", webhook=made.view.id)

    def test_pings_on_request(
        self, made: MadeWebhook, service: WebhookService, receiver: Receiver, deliverer: Deliverer
    ) -> None:
        sent = service.ping("ada", made.view.id)
        assert (sent.kind, sent.state, sent.job, sent.attempts) == ("ping", "pending", None, 0)
        deliver_all(deliverer)
        message = verified(made, receiver.wait())
        assert (message["type"], message["data"]) == ("ping", {"webhook": made.view.id})
        assert receiver.received[0].headers["webhook-id"] == sent.id
        assert service.delivery("ada", made.view.id, sent.id).state == "delivered"

    def test_that_is_deleted_is_sent_nothing_more(
        self, made: MadeWebhook, service: WebhookService, bench: Bench, receiver: Receiver, deliverer: Deliverer
    ) -> None:
        job = bench.submit(webhook=made.view.id)
        service.ping("ada", made.view.id)
        service.delete("ada", made.view.id)
        bench.work_off(job)
        assert deliverer.run_once() == 0
        assert receiver.received == []
        for call in (service.get, service.delete, service.ping, service.deliveries):
            with pytest.raises(NotFound):
                call("ada", made.view.id)
        with pytest.raises(NotFound):
            bench.submit(webhook=made.view.id)
        assert service.list("ada").items == ()

    def test_there_are_only_so_many_of_one_owner_however_they_race(
        self, engine: Engine, settings: Settings, receiver: Receiver
    ) -> None:
        service = WebhookService(engine, settings.model_copy(update={"max_webhooks": 3}))

        def create(_: int) -> bool:
            try:
                service.create("ada", NewWebhook(url=receiver.url))
            except QuotaExceeded:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(create, range(8))) == 3
        service.delete("ada", service.list("ada").items[0].id)
        assert create(0)

    def test_lists_come_in_pages(self, service: WebhookService, receiver: Receiver) -> None:
        ids = [service.create("ada", NewWebhook(url=receiver.url)).view.id for _ in range(3)]
        first = service.list("ada", limit=2)
        rest = service.list("ada", first.next_cursor, limit=2)
        assert [item.id for item in (*first.items, *rest.items)] == ids[::-1]
        assert rest.next_cursor is None
        sent = [service.ping("ada", ids[0]).id for _ in range(3)]
        first_page = service.deliveries("ada", ids[0], limit=2)
        rest_page = service.deliveries("ada", ids[0], first_page.next_cursor, limit=2)
        assert [item.id for item in (*first_page.items, *rest_page.items)] == sent[::-1]

    def test_at_an_address_that_is_closed_is_refused(self, engine: Engine, settings: Settings) -> None:
        closed = WebhookService(engine, settings.model_copy(update={"allow_private_webhooks": False}))
        with pytest.raises(AddressRefused):
            closed.create("ada", NewWebhook(url="https://192.168.0.1/hook"))


class TestADeliveryThatFails:
    """Again after a growing wait, the same message; in the end given up."""

    def test_is_made_again_with_the_same_id_and_body(
        self, made: MadeWebhook, service: WebhookService, receiver: Receiver, deliverer: Deliverer, engine: Engine
    ) -> None:
        service.ping("ada", made.view.id)
        receiver.statuses = [500]
        assert deliverer.run_once() == 1
        (row,) = logged(service, made)
        assert (row.state, row.attempts, row.last_status) == ("pending", 1, 500)
        assert row.last_error == "the receiver answered 500"
        assert service.get("ada", made.view.id).failing_since is not None
        assert deliverer.run_once() == 0, "it is not due yet"
        become_due(engine)
        assert deliverer.run_once() == 1
        first, second = receiver.received
        assert (first.headers["webhook-id"], first.body) == (second.headers["webhook-id"], second.body)
        assert verified(made, first) == verified(made, second)
        (row,) = logged(service, made)
        assert (row.state, row.attempts, row.last_status) == ("delivered", 2, 200)
        assert service.get("ada", made.view.id).failing_since is None

    def test_waits_as_the_standard_says_and_is_given_up_after_ten_attempts(
        self, made: MadeWebhook, service: WebhookService, receiver: Receiver, deliverer: Deliverer, engine: Engine
    ) -> None:
        service.ping("ada", made.view.id)
        receiver.statuses = [503] * 20
        for number, delay in enumerate((5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400), 1):
            assert deliverer.run_once() == 1
            (row,) = logged(service, made)
            assert row.attempts == number
            assert row.next_at is not None
            assert row.attempted_at is not None
            waits = (row.next_at - row.attempted_at).total_seconds()
            assert delay <= waits <= 1.1 * delay + 5
            become_due(engine)
        assert deliverer.run_once() == 1
        (row,) = logged(service, made)
        assert (row.state, row.attempts, row.next_at) == ("failed", 10, None)
        assert deliverer.run_once() == 0
        assert len(SCHEDULE) + 1 == len(receiver.received) == 10

    @pytest.mark.parametrize("status", [302, 304, 400, 404, 429, 500])
    def test_is_one_that_any_answer_but_a_success_was_given_to(
        self, made: MadeWebhook, service: WebhookService, receiver: Receiver, deliverer: Deliverer, status: int
    ) -> None:
        service.ping("ada", made.view.id)
        receiver.statuses, receiver.headers = [status], {"Location": receiver.url + "/elsewhere"}
        deliverer.run_once()
        assert [(row.state, row.last_status) for row in logged(service, made)] == [("pending", status)]
        assert [got.path for got in receiver.received] == ["/hook"], "redirects are not followed"

    def test_says_why_when_nobody_answers(
        self, service: WebhookService, deliverer: Deliverer, receiver: Receiver
    ) -> None:
        made = service.create("ada", NewWebhook(url="http://127.0.0.1:1/"))
        service.ping("ada", made.view.id)
        deliverer.run_once()
        (row,) = logged(service, made)
        assert (row.state, row.last_status) == ("pending", None)
        assert "refused" in (row.last_error or "")

    def test_because_its_address_is_closed_by_now_reaches_nobody(
        self, made: MadeWebhook, service: WebhookService, receiver: Receiver, engine: Engine, settings: Settings
    ) -> None:
        """What was allowed when it was registered is looked at again at every attempt."""
        service.ping("ada", made.view.id)
        Deliverer(engine, settings.model_copy(update={"allow_private_webhooks": False})).run_once()
        (row,) = logged(service, made)
        assert (row.state, row.last_error) == ("pending", "only https is spoken")
        assert receiver.received == []

    def test_by_a_defect_of_ours_costs_an_attempt_and_tells_nothing_of_itself(
        self, made: MadeWebhook, service: WebhookService, engine: Engine, settings: Settings
    ) -> None:
        def broken(*_: Any) -> int:
            raise RuntimeError("secret detail")

        service.ping("ada", made.view.id)
        Deliverer(engine, settings, broken).run_once()
        (row,) = logged(service, made)
        assert (row.state, row.attempts, row.last_error) == ("pending", 1, "an error inside the service")


class TestAWebhookIsDisabled:
    """By its own word, or by days of nothing but failures."""

    def test_when_it_says_that_it_is_gone(
        self, made: MadeWebhook, service: WebhookService, receiver: Receiver, deliverer: Deliverer, bench: Bench
    ) -> None:
        service.ping("ada", made.view.id)
        service.ping("ada", made.view.id)
        receiver.statuses = [410]
        deliver_all(deliverer)
        assert len(receiver.received) == 1
        found = service.get("ada", made.view.id)
        assert (found.disabled_reason, found.disabled_at is None) == ("gone", False)
        assert [(row.state, row.last_error) for row in logged(service, made)] == [
            ("failed", "the webhook was disabled: gone")
        ] * 2
        with pytest.raises(Conflict):
            service.ping("ada", made.view.id)
        with pytest.raises(Conflict):
            bench.submit(webhook=made.view.id)
        bench.work_off(bench.submit())
        assert len(logged(service, made)) == 2

    def test_after_five_days_without_a_success(
        self, made: MadeWebhook, service: WebhookService, receiver: Receiver, deliverer: Deliverer, engine: Engine
    ) -> None:
        receiver.statuses = [500] * 5
        for days in (0.0, 4.9, 5.1):
            assert service.get("ada", made.view.id).disabled_at is None
            service.ping("ada", made.view.id)
            with engine.begin() as connection:
                ago = {"since": f"{days} days"}
                connection.execute(
                    text("UPDATE webhook SET failing_since = clock_timestamp() - CAST(:since AS interval)"), ago
                )
            deliverer.run_once()
        assert service.get("ada", made.view.id).disabled_reason == "failing"


class TestManyDeliverers:
    """Any number of processes deliver; each message is theirs once, and dying loses none."""

    def test_racing_ones_send_each_message_once(
        self, service: WebhookService, receiver: Receiver, engine: Engine, settings: Settings
    ) -> None:
        hooks = [service.create("ada", NewWebhook(url=receiver.url)) for _ in range(10)]
        sent = {service.ping("ada", hook.view.id).id for hook in hooks for _ in range(3)}
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda _: deliver_all(Deliverer(engine, settings)), range(6)))
        assert sorted(got.headers["webhook-id"] for got in receiver.received) == sorted(sent)

    def test_one_that_died_is_made_again_and_changes_nothing_if_it_wakes(
        self, made: MadeWebhook, service: WebhookService, receiver: Receiver, deliverer: Deliverer, engine: Engine
    ) -> None:
        service.ping("ada", made.view.id)
        with writing(engine) as session:
            (zombie,) = webhook_rows.claim(session, 10, (), 60.0)
        assert deliverer.run_once() == 0, "its lease holds"
        receiver.statuses = [500]
        for state in ("pending", "delivered"):
            become_due(engine)
            assert deliverer.run_once() == 1
            log, webhook = logged(service, made), service.get("ada", made.view.id)
            assert [row.state for row in log] == [state]
            deliverer._settle(zombie, 503, "too late", taken=False)
            deliverer._settle(zombie, 200, "", taken=True)
            assert (logged(service, made), service.get("ada", made.view.id)) == (log, webhook)

    def test_what_races_with_deleting_neither_fails_nor_leaves_anything_pending(
        self, service: WebhookService, receiver: Receiver, bench: Bench, engine: Engine, settings: Settings
    ) -> None:
        """Jobs change, messages are sent and webhooks deleted, all of them at the same rows, for thirty rounds."""
        checkpoint = bench.checkpoint()

        deliverer = Deliverer(engine, settings, lambda *_: 500)
        with ThreadPoolExecutor(8) as pool:
            for _ in range(30):
                made = service.create("ada", NewWebhook(url=receiver.url))
                jobs = [bench.submit(checkpoint).id for _ in range(4)]
                futures = [pool.submit(bench.jobs.cancel, "ada", job) for job in jobs]
                sending = [pool.submit(deliverer.run_once) for _ in range(3)]
                futures[0].result()
                service.delete("ada", made.view.id)
                for cancelled_one in futures:
                    cancelled_one.result()
                for sent in sending:
                    sent.result()
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM webhook_delivery WHERE state = 'pending'")) == 0
            assert connection.scalar(text("SELECT count(*) FROM webhook_delivery")) > 0

    def test_a_slow_receiver_waits_for_itself_alone(
        self, made: MadeWebhook, service: WebhookService, receiver: Receiver, deliverer: Deliverer, bench: Bench
    ) -> None:
        ended = threading.Event()
        serving = threading.Thread(target=deliverer.serve, args=(ended,), daemon=True)
        with ExitStack() as stack:
            quick = stack.enter_context(receiving())
            stack.callback(serving.join, 20)
            stack.callback(ended.set)
            stack.callback(receiver.gate.set)
            receiver.gate.clear()
            other = service.create("ada", NewWebhook(url=quick.url))
            sent = [service.ping("ada", made.view.id).id for _ in range(2)]
            serving.start()
            receiver.wait()
            for _ in range(3):
                assert verified(other, (service.ping("ada", other.view.id), quick.wait())[1])["type"] == "ping"
            assert bench.reconciler.run_once() != {}, "passes go on"
            assert len(receiver.received) == 1, "it has one message in flight"
            receiver.gate.set()
            assert receiver.wait().headers["webhook-id"] == sent[1]

    def test_the_reconcilers_process_delivers(
        self,
        made: MadeWebhook,
        service: WebhookService,
        receiver: Receiver,
        environment: dict[str, str],
        tmp_path: Path,
    ) -> None:
        child = Child("reconciler", [sys.executable, "-m", "worker.reconciler"], tmp_path / "log", environment)
        child.start()
        try:
            sent = service.ping("ada", made.view.id)
            assert receiver.wait(60).headers["webhook-id"] == sent.id
            child.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
            assert child.process.wait(20) == 0  # type: ignore[union-attr]
        finally:
            child.stop(0)
        assert [row.state for row in logged(service, made)] == ["delivered"], "what was sent was written down"


def test_the_log_forgets_what_ended_long_ago(
    made: MadeWebhook, service: WebhookService, deliverer: Deliverer, engine: Engine
) -> None:
    old, new = service.ping("ada", made.view.id), service.ping("ada", made.view.id)
    with engine.begin() as connection:
        month = "UPDATE webhook_delivery SET created_at = created_at - interval '31 days' WHERE id = :id"
        connection.execute(text(month), {"id": old.id})
    assert deliverer.forget_old() == 0, "it is pending"
    deliver_all(deliverer)
    again = Deliverer(engine, deliverer.settings)
    assert (again.forget_old(), again.forget_old()) == (1, 0)
    assert [row.id for row in logged(service, made)] == [new.id]


IMPOSSIBLE = {
    "UPDATE webhook SET disabled_reason = 'tired', disabled_at = now()": "ck_webhook_disabled_reason_known",
    "UPDATE webhook SET disabled_at = now()": "ck_webhook_disabled_has_reason",
    "UPDATE webhook SET secret = ''": "ck_webhook_deleted_has_no_secret",
    "UPDATE webhook SET disabled_reason = 'deleted', disabled_at = now()": "ck_webhook_deleted_has_no_secret",
    "UPDATE webhook SET kinds = '{job.queued}'": "ck_webhook_kinds_known",
    "UPDATE job SET owner = 'eve'": "fk_job_webhook_of_owner",
    "UPDATE job SET webhook_id = 'wh_0'": "fk_job_webhook_of_owner",
    "DELETE FROM webhook": "fk_job_webhook_of_owner",
    "UPDATE webhook_delivery SET state = 'lost', next_at = NULL": "ck_webhook_delivery_state_known",
    "UPDATE webhook_delivery SET kind = 'job.queued'": "ck_webhook_delivery_kind_known",
    "UPDATE webhook_delivery SET kind = 'ping'": "ck_webhook_delivery_ping_has_no_job",
    "UPDATE webhook_delivery SET event_seq = NULL": "ck_webhook_delivery_job_has_event",
    "UPDATE webhook_delivery SET next_at = NULL": "ck_webhook_delivery_pending_has_next",
    "UPDATE webhook_delivery SET state = 'delivered', next_at = NULL, last_status = 200": (
        "ck_webhook_delivery_delivered_has_time"
    ),
    "UPDATE webhook_delivery SET state = 'delivered', next_at = NULL, delivered_at = now()": (
        "ck_webhook_delivery_delivered_was_accepted"
    ),
    "UPDATE webhook_delivery SET state = 'failed', next_at = NULL": "ck_webhook_delivery_failed_has_error",
    "UPDATE webhook_delivery SET attempts = -1, attempted_at = now()": "ck_webhook_delivery_attempts_not_negative",
    "UPDATE webhook_delivery SET attempts = 1": "ck_webhook_delivery_attempted_has_time",
    "INSERT INTO webhook_delivery (id, webhook_id, job_id, event_seq, kind, body, next_at) "
    "SELECT 'msg_1', webhook_id, job_id, event_seq, kind, body, next_at FROM webhook_delivery": (
        "uq_webhook_delivery_job_id_event_seq_webhook_id"
    ),
}


def test_what_cannot_be_is_refused_by_the_database_itself(bench: Bench, made: MadeWebhook) -> None:
    """A job that has begun and names a webhook; each statement alone would tell a lie about them."""
    bench.claim(bench.submit(webhook=made.view.id), "fetch")
    for statement, constraint in IMPOSSIBLE.items():
        with pytest.raises(IntegrityError) as refused, bench.engine.begin() as connection:
            connection.execute(text(statement))
        assert refused.value.orig.diag.constraint_name == constraint, statement  # type: ignore[union-attr]


def test_a_message_is_kept_as_it_will_be_sent(bench: Bench, made: MadeWebhook, engine: Engine) -> None:
    bench.claim(bench.submit(name="größer"), "fetch")
    with engine.connect() as connection:
        body = connection.scalar(text("SELECT body FROM webhook_delivery"))
    assert json.loads(body)["data"]["name"] == "größer"
