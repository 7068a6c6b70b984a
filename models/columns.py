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

SUBSCRIPTION_VALUES = ", ".join(
    f"{column}::text" if kind == "json" else column for column, kind in SUBSCRIPTION_COLUMNS.items()
)
"""What to select of a subscription: JSON as its text."""
