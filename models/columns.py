"""Columns that several readers and the writer name alike."""

from __future__ import annotations

SUBSCRIPTION_COLUMNS = {
    "account": "text", "plan": "text", "status": "text", "anchor": "timestamptz", "zone": "text", "number": "int",
    "period_start": "timestamptz", "period_end": "timestamptz", "paid_until": "timestamptz",
    "ended_at": "timestamptz", "cancels": "bool", "allotted_micro": "bigint", "payment": "text",
    "price_minor": "bigint", "price_currency": "text", "price_per_micro": "bigint", "lots": "int[]",
    "renewal_lots": "int[]", "terms": "json", "pending": "json", "renewal": "json", "pending_at": "timestamptz",
}  # fmt: skip
"""In the order of :func:`models.rules.state.subscription_row`, the account first."""

PURCHASE_COLUMNS = {
    "account": "text", "purchase": "text", "step": "bigint", "paid_minor": "bigint", "returned_minor": "bigint",
    "currency": "text", "is_frozen": "bool", "taken_micro": "bigint", "lots": "int[]", "takings": "json",
}  # fmt: skip
"""In the order of :func:`models.rules.state.purchase_row`, the account first."""

ALLOWANCE_COLUMNS = {
    "account": "text", "key": "text", "limit_micro": "bigint", "period": "text", "since": "timestamptz",
    "used_micro": "bigint", "uses": "bigint", "is_listed": "bool",
}  # fmt: skip
"""In the order of :func:`models.rules.sharing.allowance_row`, the account first."""

REFERRAL_COLUMNS = {
    "account": "text", "code": "text", "referrer": "text", "claimed_code": "text", "claimed_at": "timestamptz",
    "settled_at": "timestamptz", "referees": "bigint",
}  # fmt: skip
"""In the order of :func:`models.rules.sharing.referral_row`, the account first."""

CODE_COLUMNS = (
    "code", "kind", "account", "operation", "place", "amount_micro", "uses", "expires_at", "status", "used",
    "closed_at", "terms",
)  # fmt: skip
"""In the order of :func:`models.rules.sharing.code_row`."""

PURCHASE_VALUES = ", ".join(
    f"p.{column}::text" if kind == "json" else f"p.{column}" for column, kind in PURCHASE_COLUMNS.items()
)
"""What to select of ``purchases p``: JSON as its text."""

SUBSCRIPTION_VALUES = ", ".join(
    f"{column}::text" if kind == "json" else column for column, kind in SUBSCRIPTION_COLUMNS.items()
)
"""What to select of a subscription: JSON as its text."""
