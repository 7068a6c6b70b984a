"""Seals, checkpoints, and the roles of those who write, and of those who only read (ledger rules: proof).

Whoever migrates owns the tables. Everybody else is a member of one of two groups that nobody logs in as:
``creditlane_workers`` may append to the ledger and change what stands for the present state, never what was written
once; ``creditlane_readers`` may look. The groups belong to the whole server, so another database may have made them.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

BUCKETS = ", ".join(
    f"{bucket}_micro BIGINT NOT NULL"
    for bucket in (
        "granted", "received", "restored", "available", "held", "in_transit", "consumed", "expired", "revoked", "sent",
    )
)  # fmt: skip

TABLES = f"""
CREATE TABLE seals (
    number BIGINT NOT NULL,
    cutoff TIMESTAMP WITH TIME ZONE NOT NULL,
    accounts BIGINT NOT NULL,
    operations BIGINT NOT NULL,
    entries BIGINT NOT NULL,
    previous BYTEA NOT NULL,
    root BYTEA NOT NULL,
    sealed_at TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (number)
);
CREATE TABLE seal_leaves (
    account TEXT NOT NULL,
    seal BIGINT NOT NULL,
    seq BIGINT NOT NULL,
    head BYTEA NOT NULL,
    operations BIGINT NOT NULL,
    operations_head BYTEA NOT NULL,
    PRIMARY KEY (account, seal)
);
CREATE TABLE audits (
    number BIGINT GENERATED ALWAYS AS IDENTITY,
    cutoff TIMESTAMP WITH TIME ZONE,
    audited_at TIMESTAMP WITH TIME ZONE NOT NULL,
    accounts BIGINT NOT NULL,
    operations BIGINT NOT NULL,
    entries BIGINT NOT NULL,
    PRIMARY KEY (number)
);
CREATE TABLE checkpoints (
    account TEXT NOT NULL,
    operations BIGINT NOT NULL,
    seq BIGINT NOT NULL,
    head BYTEA NOT NULL,
    debt_micro BIGINT NOT NULL,
    {BUCKETS},
    PRIMARY KEY (account)
) WITH (fillfactor = 70);
CREATE TABLE checkpoint_grants (
    account TEXT NOT NULL,
    grant_id INTEGER NOT NULL,
    {BUCKETS},
    PRIMARY KEY (account, grant_id)
) WITH (fillfactor = 70);
CREATE TRIGGER seals_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON seals
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER seal_leaves_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON seal_leaves
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER audits_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audits
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
"""

# The tables are written in the order of time, so an index of block ranges is tiny and costs an insert next to nothing.
INDEXES = """
CREATE INDEX seal_leaves_by_seal ON seal_leaves USING brin (seal) WITH (pages_per_range = 16, autosummarize = on);
CREATE INDEX operations_by_time ON operations USING brin (applied_at) WITH (pages_per_range = 16, autosummarize = on);
CREATE INDEX entries_by_time ON entries USING brin (recorded_at) WITH (pages_per_range = 16, autosummarize = on);
"""

GROUPS = """
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['creditlane_workers', 'creditlane_readers'] LOOP
        BEGIN
            IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
                EXECUTE format('CREATE ROLE %I NOLOGIN', name);
            END IF;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL; -- the migration of another database of this server made it meanwhile
        WHEN insufficient_privilege THEN
            RAISE EXCEPTION 'the role % is not there, and this role may not create it', name
                USING ERRCODE = 'insufficient_privilege',
                      HINT = format('Have an administrator run CREATE ROLE %I NOLOGIN, then migrate again.', name);
        END;
    END LOOP;
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO creditlane_workers, creditlane_readers', current_schema());
    EXECUTE format('GRANT SELECT ON ALL TABLES IN SCHEMA %I TO creditlane_workers, creditlane_readers',
                   current_schema());
    EXECUTE format('GRANT USAGE ON ALL SEQUENCES IN SCHEMA %I TO creditlane_workers', current_schema());
    -- A later migration grants what its own tables need to be written; to look at them is granted by this.
    EXECUTE format('ALTER DEFAULT PRIVILEGES IN SCHEMA %I GRANT SELECT ON TABLES'
                   ' TO creditlane_workers, creditlane_readers', current_schema());
END $$;
GRANT INSERT ON operations, entries, seals, seal_leaves, audits TO creditlane_workers;
GRANT INSERT, UPDATE ON accounts, grants, holds, receipts, quarantine, checkpoints, checkpoint_grants
    TO creditlane_workers;
-- UPDATE only to lock its rows while they are published.
GRANT INSERT, UPDATE, DELETE ON outbox TO creditlane_workers;
GRANT EXECUTE ON FUNCTION ledger_now() TO creditlane_workers, creditlane_readers;
"""


def upgrade() -> None:
    """Create everything. The driver's own connection runs the text as it stands, percent signs included."""
    driver = op.get_bind().connection.dbapi_connection
    assert driver is not None
    for statements in (TABLES, INDEXES, GROUPS):
        driver.cursor().execute(statements)
