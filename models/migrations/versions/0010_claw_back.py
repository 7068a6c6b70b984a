"""Claw-back by state: what is known of purchases that were returned or disputed."""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

STATEMENTS = """
CREATE TABLE purchases (
    account TEXT NOT NULL,
    purchase TEXT NOT NULL,
    step BIGINT NOT NULL,
    paid_minor BIGINT NOT NULL,
    returned_minor BIGINT NOT NULL,
    currency TEXT,
    is_frozen BOOLEAN NOT NULL,
    taken_micro BIGINT NOT NULL,
    lots INTEGER[] NOT NULL,
    takings JSON NOT NULL,
    PRIMARY KEY (account, purchase),
    CONSTRAINT purchases_not_negative CHECK (
        step >= 1 AND paid_minor >= 0 AND returned_minor >= 0 AND taken_micro >= 0
    )
) WITH (fillfactor = 70);
GRANT INSERT, UPDATE ON purchases TO creditlane_workers;
"""


def upgrade() -> None:
    """Create the table."""
    op.execute(STATEMENTS)


def downgrade() -> None:
    """Drop it."""
    op.execute("DROP TABLE purchases")
