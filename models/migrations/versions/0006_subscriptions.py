"""Subscriptions, what an account's thresholds are percentages of, and notices with their deliveries."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

STATEMENTS = """
ALTER TABLE accounts ADD COLUMN reference_micro BIGINT NOT NULL DEFAULT '0';
CREATE TABLE subscriptions (
    account TEXT NOT NULL,
    plan TEXT NOT NULL,
    status TEXT NOT NULL,
    anchor TIMESTAMP WITH TIME ZONE NOT NULL,
    zone TEXT NOT NULL,
    number INTEGER NOT NULL,
    period_start TIMESTAMP WITH TIME ZONE NOT NULL,
    period_end TIMESTAMP WITH TIME ZONE NOT NULL,
    paid_until TIMESTAMP WITH TIME ZONE,
    ended_at TIMESTAMP WITH TIME ZONE,
    cancels BOOLEAN NOT NULL,
    allotted_micro BIGINT NOT NULL,
    payment TEXT,
    price_minor BIGINT,
    price_currency TEXT,
    price_per_micro BIGINT,
    lots INTEGER[] NOT NULL,
    renewal_lots INTEGER[] NOT NULL,
    terms JSON NOT NULL,
    pending JSON,
    renewal JSON,
    pending_at TIMESTAMP WITH TIME ZONE,
    PRIMARY KEY (account),
    CONSTRAINT subscriptions_period CHECK (period_start < period_end AND allotted_micro >= 0)
) WITH (fillfactor = 70);
CREATE TABLE notices (
    account TEXT NOT NULL,
    key TEXT NOT NULL,
    kind TEXT NOT NULL,
    at TIMESTAMP WITH TIME ZONE NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    details JSON NOT NULL,
    channels TEXT[] NOT NULL,
    read_at TIMESTAMP WITH TIME ZONE,
    delivered_at TIMESTAMP WITH TIME ZONE,
    PRIMARY KEY (account, key)
);
CREATE INDEX notices_by_time ON notices (account, created_at);
CREATE INDEX notices_undelivered ON notices (created_at, account, key) WHERE delivered_at IS NULL;
CREATE TABLE deliveries (
    account TEXT NOT NULL,
    key TEXT NOT NULL,
    channel TEXT NOT NULL,
    status TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    next_attempt_at TIMESTAMP WITH TIME ZONE,
    sent_at TIMESTAMP WITH TIME ZONE,
    error TEXT,
    PRIMARY KEY (account, key, channel)
) WITH (fillfactor = 70);
GRANT INSERT, UPDATE ON subscriptions TO creditlane_workers;
GRANT INSERT, UPDATE, DELETE ON notices, deliveries TO creditlane_workers;
"""


def upgrade() -> None:
    """Create the column and the tables."""
    op.execute(STATEMENTS)


def downgrade() -> None:
    """Drop them."""
    op.execute("DROP TABLE deliveries, notices, subscriptions; ALTER TABLE accounts DROP COLUMN reference_micro")
