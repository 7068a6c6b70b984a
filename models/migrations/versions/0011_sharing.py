"""Leads that were converted, achievements, limits by period, codes and referrals."""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

STATEMENTS = """
ALTER TABLE accounts ADD COLUMN converted_to TEXT, ADD COLUMN achieved TEXT;
CREATE INDEX accounts_converted ON accounts (account) WHERE converted_to IS NOT NULL;
CREATE TABLE allowances (
    account TEXT NOT NULL,
    key TEXT NOT NULL,
    limit_micro BIGINT,
    period TEXT NOT NULL,
    since TIMESTAMP WITH TIME ZONE NOT NULL,
    used_micro BIGINT NOT NULL,
    uses BIGINT NOT NULL,
    is_listed BOOLEAN,
    PRIMARY KEY (account, key),
    CONSTRAINT allowances_not_negative CHECK (used_micro >= 0 AND uses >= 0)
) WITH (fillfactor = 70);
CREATE TABLE referrals (
    account TEXT NOT NULL,
    code TEXT,
    referrer TEXT,
    claimed_code TEXT,
    claimed_at TIMESTAMP WITH TIME ZONE,
    settled_at TIMESTAMP WITH TIME ZONE,
    referees BIGINT NOT NULL,
    PRIMARY KEY (account)
) WITH (fillfactor = 70);
CREATE INDEX referrals_by_referrer ON referrals (referrer, claimed_at) WHERE referrer IS NOT NULL;
CREATE INDEX referrals_settled ON referrals (settled_at) WHERE settled_at IS NOT NULL;
CREATE TABLE codes (
    code TEXT NOT NULL,
    kind TEXT NOT NULL,
    account TEXT NOT NULL,
    operation TEXT NOT NULL,
    place INTEGER NOT NULL,
    amount_micro BIGINT NOT NULL,
    uses BIGINT,
    expires_at TIMESTAMP WITH TIME ZONE,
    status TEXT NOT NULL,
    used BIGINT NOT NULL,
    closed_at TIMESTAMP WITH TIME ZONE,
    terms JSON NOT NULL,
    PRIMARY KEY (code),
    CONSTRAINT codes_uses CHECK (used >= 0 AND (uses IS NULL OR used <= uses))
) WITH (fillfactor = 70);
CREATE INDEX codes_by_account ON codes (account, operation, place);
CREATE INDEX codes_ending ON codes (expires_at, code) WHERE status = 'open' AND expires_at IS NOT NULL;
CREATE TABLE redemptions (
    code TEXT NOT NULL,
    slot BIGINT NOT NULL,
    account TEXT NOT NULL,
    operation TEXT NOT NULL,
    amount_micro BIGINT NOT NULL,
    at TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (code, slot)
);
CREATE INDEX redemptions_by_account ON redemptions (account, at);
CREATE TRIGGER redemptions_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON redemptions
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
GRANT INSERT, UPDATE ON allowances, referrals TO creditlane_workers;
GRANT INSERT, UPDATE (used, status, closed_at) ON codes TO creditlane_workers;
GRANT INSERT ON redemptions TO creditlane_workers;
"""


def upgrade() -> None:
    """Create columns and tables."""
    op.execute(STATEMENTS)


def downgrade() -> None:
    """Drop them."""
    op.execute(
        "DROP INDEX accounts_converted; DROP TABLE redemptions, codes, referrals, allowances;"
        " ALTER TABLE accounts DROP COLUMN converted_to, DROP COLUMN achieved"
    )
