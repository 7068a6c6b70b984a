"""The texts of catalogs: what was in force under each label that operations have."""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

STATEMENTS = """
CREATE TABLE catalogs (
    label TEXT NOT NULL,
    text TEXT NOT NULL,
    first_used_at TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (label),
    CONSTRAINT catalogs_label CHECK (label ~ '^[a-z0-9_-]{1,64}-[1-9][0-9]*$')
);
CREATE TRIGGER catalogs_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON catalogs
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
GRANT INSERT ON catalogs TO creditlane_workers;
"""


def upgrade() -> None:
    """Create the table."""
    op.execute(STATEMENTS)


def downgrade() -> None:
    """Drop it."""
    op.execute("DROP TABLE catalogs")
