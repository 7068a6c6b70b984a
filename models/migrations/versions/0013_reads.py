"""Reports over all accounts read their days alone: usage, lots and refunds are found by time."""

from __future__ import annotations

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

STATEMENTS = """
CREATE INDEX usage_days_by_day ON usage_days USING brin (day) WITH (pages_per_range = 16, autosummarize = on);
CREATE INDEX grants_by_time ON grants USING brin (created_at) WITH (pages_per_range = 16, autosummarize = on);
CREATE INDEX operations_refunds ON operations (applied_at) WHERE name = 'credits.refund';
"""


def upgrade() -> None:
    """Make the indexes."""
    op.execute(STATEMENTS)


def downgrade() -> None:
    """Drop them."""
    op.execute("DROP INDEX operations_refunds, grants_by_time, usage_days_by_day")
