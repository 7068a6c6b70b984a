"""Events out: what the ledger tells whoever listens (messages: events out).

The ledger publishes them to the topic exchange :data:`EXCHANGE` after the commit, at least once each. Which ones is a
setting of the workers, since each costs a row; none unless they are asked for. An account's events come with ascending
``seq``; after a fault older ones may come again, or late: a listener drops what is not newer than what it has seen.
"""

from __future__ import annotations

import re
from datetime import datetime
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from creditlane.contract import Balance, GrantUse
from creditlane.lanes import LANES, lane_of

EXCHANGE = "credits.events"
"""The topic exchange."""

BALANCE_CHANGED, BALANCE_DEPLETED = "balance.changed", "balance.depleted"

PAYMENT_SETTLED = "payment.settled"
"""A provider said that a pack or a period was paid for, and the operation that gives its credits is on its way."""

BY_ENTRY = {
    "granted": "credits.granted",
    "consumed": "credits.consumed",
    "held": "credits.held",
    "captured": "credits.captured",
    "released": "credits.released",
    "restored": "credits.refunded",
    "expired": "credits.expired",
    "revoked": "credits.revoked",
    "transferred": "credits.transferred",
    "sent": "credits.sent",
    "bounced": "credits.bounced",
    "received": "credits.received",
    "rolled_out": "credits.rolled_out",
    "rolled_in": "credits.rolled_in",
    "unexpired": "credits.unexpired",
    "debt_incurred": "credits.debt_incurred",
    "debt_paid": "credits.debt_paid",
    "debt_cancelled": "credits.debt_cancelled",
    "reinstated": "credits.reinstated",
}
"""The type of event that each kind of ledger entry makes."""

BY_NOTICE = {
    "low_balance": "balance.low",
    "period_renewed": "plan.renewed",
    "plan_started": "plan.started",
    "plan_changed": "plan.changed",
    "plan_cancelled": "plan.cancelled",
    "plan_ended": "plan.ended",
    "achievement": "achievement.reached",
}
"""The type of event that a notice makes, where the catalog's ``[notify]`` has notices of its kind made."""

TYPES = (BALANCE_CHANGED, BALANCE_DEPLETED, PAYMENT_SETTLED, *BY_ENTRY.values(), *BY_NOTICE.values())
"""Every type of event."""

_PATTERN = re.compile(r"[a-z_.*]{1,64}\Z", re.ASCII)


class Event(msgspec.Struct, kw_only=True, frozen=True):
    """One event, as it is on the wire."""

    id: str
    """The same each time it is published."""
    type: str
    account: str
    seq: int
    """The account's last ledger entry that it tells of."""
    at: datetime
    """The account's time."""
    operation: str | None = None
    """The id of the operation that caused it; none where time did, and for ``balance.…``."""
    amount: Decimal | None = None
    """For ``credits.…``: how many."""
    grants: list[GrantUse] = []
    """For ``credits.…``: of which grants."""
    balance_after: Decimal | None = None
    """For ``credits.…``: the account's credits after it, those that take effect later included."""
    balance: Balance | None = None
    """For ``balance.changed`` and ``.depleted``: the whole balance."""
    details: dict[str, Any] = {}
    """For ``balance.low``, ``plan.…`` and ``achievement.reached``: what the notice says; for ``payment.settled``: what
    was paid for."""


def routing_key(type: str, account: str, lanes: int = LANES) -> str:
    """Under which key an event is published: its type, then its account's lane, as ``credits.held.lane.007``."""
    return f"{type}.{lane_of(account, lanes)}"


def matching(patterns: str) -> frozenset[str]:
    """The types that a comma list of patterns names: ``balance.changed,credits.*``, or ``*`` for all.

    :raises ValueError: for a pattern that fits no type.
    """
    found: set[str] = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        fitting = [type for type in TYPES if _PATTERN.match(pattern) and fnmatchcase(type, pattern)]
        if not fitting:
            raise ValueError(f"{pattern[:64]!r} is no type of event; there are {', '.join(TYPES)}")
        found.update(fitting)
    return frozenset(found)
