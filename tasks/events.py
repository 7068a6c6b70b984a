"""Which events follow from what a batch did to an account (messages: events out). Pure."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from hashlib import sha256
from itertools import groupby
from typing import Any

from creditlane.amounts import format_amount
from creditlane.events import BALANCE_CHANGED, BALANCE_DEPLETED, BY_ENTRY, BY_NOTICE
from models.rules.state import Account
from tasks.ledger import balance_of


def events_of(account: Account, spendable_before: int, wanted: frozenset[str]) -> Iterator[dict[str, Any]]:
    """The events of an account's new notices and entries, those of entries in the order of their ``seq``.

    First those of notices. Then one for each run of entries of one operation and kind; then, for all of them together,
    that nothing is left to spend, if it was this batch that left nothing, and that the balance changed.

    :param spendable_before: what was spendable before the batch.
    :param wanted: types, as of :func:`creditlane.events.matching`.
    :returns: each as :class:`creditlane.events.Event` on the wire.
    """
    for notice in account.notices:
        type = BY_NOTICE.get(notice.kind, "")
        if type in wanted:
            yield {**_event(account, type, account.seq, notice.at, notice.key), "details": notice.details}
    if not account.entries:
        return
    for (kind, operation), run in groupby(account.entries, key=lambda entry: (entry.kind, entry.operation)):
        if BY_ENTRY[kind] not in wanted:
            continue
        entries = list(run)
        event = _event(account, BY_ENTRY[kind], entries[-1].seq, entries[-1].recorded_at)
        if operation is not None:
            event["operation"] = operation
        event["amount"] = format_amount(sum(entry.amount_micro for entry in entries))
        event["grants"] = [
            {
                "grant": entry.grant,
                "source": account.grants[entry.grant].source,
                "amount": format_amount(entry.amount_micro),
            }
            for entry in entries
        ]
        event["balance_after"] = format_amount(entries[-1].balance_after_micro)
        yield event
    last = account.entries[-1]
    for type in (BALANCE_DEPLETED, BALANCE_CHANGED):
        if type not in wanted:
            continue
        if type == BALANCE_DEPLETED and not (spendable_before and not account.spendable(last.recorded_at)):
            continue
        yield {
            **_event(account, type, last.seq, last.recorded_at),
            "balance": balance_of(account, last.recorded_at),
        }


def _event(account: Account, type: str, seq: int, at: datetime, key: str | None = None) -> dict[str, Any]:
    id = sha256(f"{type}:{seq if key is None else key}:{account.account}".encode()).hexdigest()[:32]
    return {"id": id, "type": type, "account": account.account, "seq": seq, "at": at}
