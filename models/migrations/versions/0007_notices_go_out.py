"""What the delivery of notices, the inbox and the warnings of expiries are found by.

None of these indexes costs the writer a HOT update: a lot's ``expires_at`` never changes, and whether it is open is
in an index already. A lot that ends some day has one index entry more.
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

STATEMENTS = """
CREATE INDEX grants_expiring ON grants (expires_at, account, grant_id) WHERE is_open AND expires_at IS NOT NULL;
CREATE INDEX notices_unread ON notices (account, created_at) WHERE read_at IS NULL;
CREATE INDEX deliveries_due ON deliveries (next_attempt_at) WHERE next_attempt_at IS NOT NULL;
CREATE INDEX deliveries_parked ON deliveries (account, key, channel) WHERE status = 'parked';
"""


def upgrade() -> None:
    """Create the indexes."""
    op.execute(STATEMENTS)


def downgrade() -> None:
    """Drop them."""
    op.execute("DROP INDEX grants_expiring, notices_unread, deliveries_due, deliveries_parked")
