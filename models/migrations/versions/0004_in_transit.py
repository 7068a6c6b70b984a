"""Accounts with credits in transit are found by an index: the few that are looked at for transfers without an end."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the index."""
    op.execute("CREATE INDEX accounts_in_transit ON accounts (account) WHERE in_transit_micro > 0")
