"""Webhooks and their deliveries, and the webhook that a job names."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_KINDS = "'job.started', 'job.succeeded', 'job.failed', 'job.cancelled', 'job.expired'"


def upgrade() -> None:
    _create_webhook()
    _create_delivery()
    op.add_column("job", sa.Column("webhook_id", sa.Text(), nullable=True))
    op.create_foreign_key(op.f("fk_job_webhook_of_owner"), "job", "webhook", ["owner", "webhook_id"], ["owner", "id"])


def downgrade() -> None:
    op.drop_constraint(op.f("fk_job_webhook_of_owner"), "job", type_="foreignkey")
    op.drop_column("job", "webhook_id")
    op.drop_table("webhook_delivery")
    op.drop_table("webhook")


def _create_webhook() -> None:
    op.create_table(
        "webhook",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("kinds", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("failing_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("disabled_reason", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "disabled_reason IN ('gone', 'failing', 'deleted')", name=op.f("ck_webhook_disabled_reason_known")
        ),
        sa.CheckConstraint(
            "(disabled_at IS NULL) = (disabled_reason IS NULL)", name=op.f("ck_webhook_disabled_has_reason")
        ),
        sa.CheckConstraint(
            "(disabled_reason IS NOT DISTINCT FROM 'deleted') = (secret = '')",
            name=op.f("ck_webhook_deleted_has_no_secret"),
        ),
        sa.CheckConstraint(f"kinds <@ ARRAY[{_KINDS}]::text[]", name=op.f("ck_webhook_kinds_known")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook")),
        sa.UniqueConstraint("owner", "id", name=op.f("uq_webhook_owner_id")),
    )


def _create_delivery() -> None:
    op.create_table(
        "webhook_delivery",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("webhook_id", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=True),
        sa.Column("event_seq", sa.BigInteger(), nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="pending", nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("next_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_status", sa.Integer(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("delivered_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('pending', 'delivered', 'failed')", name=op.f("ck_webhook_delivery_state_known")),
        sa.CheckConstraint(f"kind IN ({_KINDS}, 'ping')", name=op.f("ck_webhook_delivery_kind_known")),
        sa.CheckConstraint("(kind = 'ping') = (job_id IS NULL)", name=op.f("ck_webhook_delivery_ping_has_no_job")),
        sa.CheckConstraint("(job_id IS NULL) = (event_seq IS NULL)", name=op.f("ck_webhook_delivery_job_has_event")),
        sa.CheckConstraint(
            "(state = 'pending') = (next_at IS NOT NULL)", name=op.f("ck_webhook_delivery_pending_has_next")
        ),
        sa.CheckConstraint(
            "(state = 'delivered') = (delivered_at IS NOT NULL)", name=op.f("ck_webhook_delivery_delivered_has_time")
        ),
        sa.CheckConstraint(
            "state <> 'delivered' OR (last_status BETWEEN 200 AND 299) IS TRUE",
            name=op.f("ck_webhook_delivery_delivered_was_accepted"),
        ),
        sa.CheckConstraint(
            "state <> 'failed' OR last_error IS NOT NULL", name=op.f("ck_webhook_delivery_failed_has_error")
        ),
        sa.CheckConstraint("attempts >= 0", name=op.f("ck_webhook_delivery_attempts_not_negative")),
        sa.CheckConstraint(
            "(attempts = 0) = (attempted_at IS NULL)", name=op.f("ck_webhook_delivery_attempted_has_time")
        ),
        sa.ForeignKeyConstraint(
            ["webhook_id"], ["webhook.id"], name=op.f("fk_webhook_delivery_webhook_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_webhook_delivery_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_delivery")),
        sa.UniqueConstraint(
            "job_id", "event_seq", "webhook_id", name=op.f("uq_webhook_delivery_job_id_event_seq_webhook_id")
        ),
    )
    op.create_index("ix_webhook_delivery_webhook_id_id", "webhook_delivery", ["webhook_id", "id"], unique=False)
    op.create_index(
        "ix_webhook_delivery_due",
        "webhook_delivery",
        ["next_at", "webhook_id"],
        unique=False,
        postgresql_where=sa.text("state = 'pending'"),
    )
