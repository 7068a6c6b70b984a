"""What schedules work on: accounts that are due, in pages; usage by day; delivered notices by age; beat's memory."""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# Of a million accounts that fall due at one instant, a page begins where the last one ended: by the account too.
STATEMENTS = """
DROP INDEX accounts_due;
CREATE INDEX accounts_due ON accounts (next_due_at, account) WHERE next_due_at IS NOT NULL;
CREATE INDEX notices_delivered ON notices (delivered_at, account, key) WHERE delivered_at IS NOT NULL;
CREATE TABLE schedules (
    name TEXT NOT NULL,
    task TEXT NOT NULL,
    last_tick_at TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (name)
);
CREATE TABLE usage_days (
    account TEXT NOT NULL,
    day DATE NOT NULL,
    feature TEXT NOT NULL,
    member TEXT NOT NULL,
    operations BIGINT NOT NULL,
    quantity_micro NUMERIC NOT NULL,
    charged_micro NUMERIC NOT NULL,
    refunded_micro NUMERIC NOT NULL,
    PRIMARY KEY (account, day, feature, member)
) WITH (fillfactor = 70);
CREATE TABLE usage_watermark (
    id SMALLINT NOT NULL,
    counted_until TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (id),
    CONSTRAINT usage_watermark_one CHECK (id = 1)
);
GRANT INSERT, UPDATE ON schedules TO creditlane_workers;
GRANT INSERT, UPDATE, DELETE ON usage_days, usage_watermark TO creditlane_workers;
CREATE FUNCTION refuse_open() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION USING MESSAGE = 'the quarantined message ' || OLD.id || ' is open',
        ERRCODE = 'restrict_violation', HINT = 'Replay or drop it first.';
END $$;
CREATE TRIGGER quarantine_open_stays BEFORE DELETE ON quarantine
    FOR EACH ROW WHEN (OLD.status = 'open') EXECUTE FUNCTION refuse_open();
GRANT DELETE ON quarantine TO creditlane_workers;
"""

BACK = """
REVOKE DELETE ON quarantine FROM creditlane_workers;
DROP TRIGGER quarantine_open_stays ON quarantine;
DROP FUNCTION refuse_open();
DROP TABLE usage_watermark, usage_days, schedules;
DROP INDEX notices_delivered;
DROP INDEX accounts_due;
CREATE INDEX accounts_due ON accounts (next_due_at) WHERE next_due_at IS NOT NULL;
"""


def upgrade() -> None:
    """Create the indexes and the tables."""
    op.execute(STATEMENTS)


def downgrade() -> None:
    """Drop them."""
    op.execute(BACK)
