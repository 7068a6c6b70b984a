"""Comparing with the provider (payments: reconciling): what it has and we never heard of, and the other way round.

By events, those that it could not deliver, and by objects, since an event can fail to be made at all: payments, refunds
and disputes since the last time. Each goes through the inbox like a webhook: an object as an event of ours, whose id
follows from the object as it is, so that the same one is taken once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import msgspec
from celery.utils.log import get_task_logger
from psycopg import Connection

from models.payment_inbox import store
from models.payments import is_known, now_of
from workers.providers.base import Adapter, Parked, VerificationError, no_fetch
from workers.stripe_api import MissingError, StripeApi

logger = get_task_logger(__name__)

VERSION = "2026-10-28.endive"
"""The API's version that objects are asked for in."""

OVERLAP = timedelta(hours=2)
"""How far each comparison reaches back behind the last one; the lists reach further by themselves, as far as something
may be paid after it was made."""

REACH = timedelta(days=35)
"""How far the daily one reaches back, and the first one."""

UNDELIVERED = timedelta(days=29)
"""How old the undelivered events are that are asked for; the provider has them for 30 days."""

SETTLING = timedelta(minutes=10)
"""How long something may be under way before it counts as missing."""

MAX_DIFFERENCES = 1000
"""Differences that a report names; it counts all."""


class Listed(NamedTuple):
    """What the provider has of one kind."""

    kind: str
    types: Callable[[Mapping[str, Any]], tuple[str, ...]]
    """The events that say what such an object says."""
    objects: Callable[[StripeApi, datetime], Iterable[Mapping[str, Any]]]


def _of_refund(refund: Mapping[str, Any]) -> tuple[str, ...]:
    return ("refund.failed",) if refund.get("status") in ("failed", "canceled") else ("refund.updated",)


def _of_dispute(dispute: Mapping[str, Any]) -> tuple[str, ...]:
    decided = dispute.get("status") in ("won", "lost", "warning_closed", "prevented")
    return ("charge.dispute.created", "charge.dispute.closed") if decided else ("charge.dispute.created",)


LISTED = (
    Listed("subscription", lambda _: ("customer.subscription.updated",), StripeApi.subscriptions),
    Listed("session", lambda _: ("checkout.session.completed",), StripeApi.paid_sessions),
    Listed("invoice", lambda _: ("invoice.paid",), StripeApi.paid_invoices),
    Listed("refund", _of_refund, StripeApi.refunds),
    Listed("dispute", _of_dispute, StripeApi.disputes),
)
"""In the order in which they lead to one another; any other would do."""


PERIOD_REASONS = ("subscription_create", "subscription_cycle", "subscription_update")
"""Of invoices that give credits."""

WATERMARK = "SELECT until FROM payment_watermarks WHERE provider = %s AND livemode = %s AND kind = %s"
PUT_WATERMARK = """
INSERT INTO payment_watermarks (provider, livemode, kind, until) VALUES (%s, %s, %s, %s)
ON CONFLICT (provider, livemode, kind) DO UPDATE SET until = greatest(payment_watermarks.until, excluded.until)
"""
KNOWN = """
SELECT kind, key, purchase, status, code, reason, fact::jsonb ->> 'account', occurred_at FROM payment_facts
WHERE provider = %(provider)s AND livemode = %(livemode)s AND kind = %(kind)s
  AND (key = ANY(%(keys)s) OR purchase = ANY(%(purchases)s) OR occurred_at >= %(since)s)
"""


class Sought(NamedTuple):
    """How the facts of an object are found."""

    fact: str
    key: Callable[[str], str] | None = None
    """What the key of its fact is; None where it is found by its purchase."""


SOUGHT = {
    "session": Sought("PackPaid", str),
    "invoice": Sought("PeriodPaid"),
    "refund": Sought("RefundChanged", str),
    "dispute": Sought("DisputeChanged", "{}:created".format),
}
NOT_ENDED = """
SELECT key FROM payment_facts WHERE provider = %s AND livemode = %s AND kind = 'SubscriptionChanged'
  AND NOT fact::jsonb ->> 'status' = ANY('{canceled,incomplete_expired}')
"""
UNDONE = """
SELECT p.operation, p.provider, p.account, p.name, p.effect, p.created_at, o.status, o.code
FROM payment_operations p LEFT JOIN operations o ON o.account = p.account AND o.operation = p.operation
WHERE p.created_at >= %s AND (o.status = 'rejected' OR (o.operation IS NULL AND p.created_at < %s))
  AND NOT (p.name = 'plans.cancel' AND o.code IS NOT DISTINCT FROM 'no_subscription')
ORDER BY p.number
"""
"""A plan that has ended already need not be cancelled."""
UNSETTLED = """
SELECT kind, key, provider, fact::jsonb ->> 'account', code, reason, heard_at FROM payment_facts
WHERE status IN ('waiting', 'parked') AND heard_at >= %s ORDER BY heard_at
"""
PARKED = """
SELECT id, provider, type, coalesce(code, 'not_read'), coalesce(reason, 'no worker has read it yet'), received_at
FROM payment_events
WHERE received_at >= %s AND (status = 'parked' OR status = 'received' AND received_at < %s) ORDER BY id
"""


class Difference(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something in which the provider and the ledger differ."""

    code: str
    what: str
    """The object, or the operation."""
    provider: str
    account: str | None = None
    reason: str | None = None
    at: datetime | None = None


class Report(msgspec.Struct, kw_only=True):
    """What a comparison came to."""

    since: datetime | None = None
    """From when on the provider's objects were compared; None where it cannot be asked."""
    compared: dict[str, int] = msgspec.field(default_factory=dict)
    """How many, by kind."""
    taken: int = 0
    """How many of them had never been heard of, and are now taken up."""
    differences: list[Difference] = msgspec.field(default_factory=list)
    total: int = 0
    """How many differences there are, those beyond :data:`MAX_DIFFERENCES` included."""

    def add(self, difference: Difference) -> None:
        """Note a difference."""
        self.total += 1
        if len(self.differences) < MAX_DIFFERENCES:
            self.differences.append(difference)


def event_of(kind: str, object: Mapping[str, Any], livemode: bool, at: datetime | None = None) -> bytes:
    """An event that says what an object says, as the provider would have written it.

    :param kind: the event's type.
    :param at: when it said so, of an object that may come to be again what it was; else when it came to be so.
    """
    told = msgspec.json.encode(object, order="deterministic")
    created = _instant(object) if at is None else int(at.timestamp())
    seen = b"" if at is None else str(created).encode()
    envelope = {
        "id": f"object_{hashlib.sha256(kind.encode() + seen + told).hexdigest()[:40]}",
        "object": "event",
        "type": kind,
        "api_version": VERSION,
        "created": created,
        "livemode": livemode,
        "data": {"object": msgspec.Raw(told)},
    }
    return msgspec.json.encode(envelope)


def _instant(object: Mapping[str, Any]) -> int:
    """When an object came to be as it is, in seconds, as far as it says."""
    paid_at = (object.get("status_transitions") or {}).get("paid_at")
    return int(paid_at or object.get("created") or 0)


class Reconciler:
    """Compares Stripe with the ledger.

    :param connection: in autocommit mode; the one that events are applied on.
    :param apply: applies an event of the inbox, by its row.
    """

    def __init__(
        self,
        connection: Connection[Any],
        api: StripeApi,
        adapter: Adapter,
        apply: Callable[[int], Any],
        livemode: bool,
    ) -> None:
        self._connection = connection
        self._api = api
        self._adapter = adapter
        self._apply = apply
        self._livemode = livemode

    def run(self, report: Report, *, deep: bool, progress: Callable[[str, int], None]) -> None:
        """Take up what was never heard of, and note in what the two differ then.

        :param deep: whether to reach back for :data:`REACH` and not from the last time.
        :param progress: told the kind that is being compared, and how many were.
        :raises StripeApiError: when the provider is out of reach, or refuses.
        """
        now = now_of(self._connection)
        # What is compared is what was there before the events are taken up that could not be delivered.
        self._undelivered(report, now, progress)
        for listed in LISTED:
            since = self._since(listed, now, deep)
            report.since = since if report.since is None else min(since, report.since)
            found: dict[str, Mapping[str, Any]] = {}
            # The oldest first: what comes later follows on it.
            for object in reversed(list(self._listed(listed, since, deep))):
                found[str(object["id"])] = object
                for kind in listed.types(object):
                    told = event_of(kind, object, self._livemode)
                    if listed.kind == "subscription":
                        report.taken += self._take_state(told, event_of(kind, object, self._livemode, now))
                    else:
                        report.taken += self._take(told)
                report.compared[listed.kind] = len(found)
                progress(listed.kind, len(found))
            report.compared[listed.kind] = len(found)
            self._compare(report, listed.kind, found, since, now)
            self._connection.execute(PUT_WATERMARK, (self._adapter.name, self._livemode, listed.kind, now))

    def look_up(self, subscription: str) -> int:
        """Take up all payments for a subscription, as one of them is missing; gives how many there are."""
        number = 0
        for invoice in reversed(list(self._api.invoices_of(subscription))):
            if invoice.get("status") == "paid":
                number += self._take(event_of("invoice.paid", invoice, self._livemode))
        return number

    def _listed(self, listed: Listed, since: datetime, deep: bool) -> Iterator[Mapping[str, Any]]:
        yield from listed.objects(self._api, since)
        if listed.kind != "subscription" or not deep:
            return
        # Of those that are live, what they are now; and of those that were, that they have ended.
        live = set()
        for subscription in self._api.live_subscriptions():
            live.add(subscription["id"])
            yield subscription
        for (id,) in self._connection.execute(NOT_ENDED, (self._adapter.name, self._livemode)).fetchall():
            if id not in live:
                try:
                    yield self._api.fetch("subscription", id)
                except MissingError:
                    logger.warning("the provider has no subscription %r any more", id)

    def _since(self, listed: Listed, now: datetime, deep: bool) -> datetime:
        row = self._connection.execute(WATERMARK, (self._adapter.name, self._livemode, listed.kind)).fetchone()
        return now - REACH if deep or row is None else row[0] - OVERLAP

    def _undelivered(self, report: Report, now: datetime, progress: Callable[[str, int], None]) -> None:
        for number, event in enumerate(self._api.undelivered_events(now - UNDELIVERED), 1):
            report.taken += self._take(msgspec.json.encode(event))
            report.compared["undelivered event"] = number
            progress("undelivered event", number)

    def _take_state(self, told: bytes, told_now: bytes) -> int:
        """Take up what a subscription is now, unless that is what was heard last: it does not say since when.

        :param told: the event that says so, of the time at which the subscription was made.
        :param told_now: the same, of now.
        """
        try:
            facts = self._adapter.normalise(self._adapter.read(told_now), no_fetch)
        except VerificationError:
            facts = ()
        if isinstance(facts, Parked) or not facts:
            return self._take(told)
        return 0 if all(is_known(self._connection, fact) for fact in facts) else self._take(told_now)

    def _take(self, body: bytes) -> int:
        """Put an event into the inbox and apply it, if it was not there; gives whether that led to anything."""
        try:
            event = self._adapter.read(body)
        except VerificationError as error:
            logger.warning("an object of %s cannot be read: %s", self._adapter.name, error.sentence)
            return 0
        stored = store(self._connection, event, body, "reconcile")
        if not stored.is_new:
            return 0
        done = self._apply(stored.id)
        return int(bool(done.operations))

    def _compare(
        self, report: Report, kind: str, found: Mapping[str, Mapping[str, Any]], since: datetime, now: datetime
    ) -> None:
        """Compare objects with what is known of them, and what is known with them."""
        provider = self._adapter.name
        if kind == "subscription":
            return  # it gives nothing: what was paid for it is compared
        sought = SOUGHT[kind]
        names = {(sought.key(id) if sought.key else f"{provider}:{id}"): id for id in found}
        rows = self._connection.execute(
            KNOWN,
            {
                "provider": provider,
                "livemode": self._livemode,
                "kind": sought.fact,
                "keys": list(names) if sought.key else [],
                "purchases": [] if sought.key else list(names),
                "since": since,
            },
        )
        known: dict[str, list[tuple[Any, ...]]] = {}
        for _, key, purchase, *row in rows:
            name = key if sought.key else purchase
            known.setdefault(names.get(name, name), []).append(tuple(row))
        for id, object in found.items():
            if not _gives(kind, object):
                continue
            if id not in known:
                report.add(
                    Difference(
                        code="not_in_ledger", what=f"{kind} {id}", provider=provider, at=_at(object),
                        reason="nothing was made of it: see its event in the inbox",
                    )
                )  # fmt: skip
        for id, told in known.items():
            for status, code, reason, account, occurred_at in told:
                if status in ("waiting", "parked"):
                    what = f"{kind} {id}"
                    report.add(
                        Difference(code=code, what=what, provider=provider, account=account, reason=reason,
                                   at=occurred_at)
                    )  # fmt: skip
                elif id not in found and since + OVERLAP < occurred_at < now - SETTLING:
                    report.add(
                        Difference(
                            code="not_at_provider", what=f"{kind} {id}", provider=provider, account=account,
                            at=occurred_at, reason="the ledger has it, and the provider does not list it",
                        )
                    )  # fmt: skip


def _gives(kind: str, object: Mapping[str, Any]) -> bool:
    """Whether credits may follow from an object: those of a subscription follow from its invoices alone."""
    if kind == "invoice":
        return object.get("billing_reason") in PERIOD_REASONS
    return kind != "session" or object.get("mode") == "payment"


def _at(object: Mapping[str, Any]) -> datetime:
    return datetime.fromtimestamp(_instant(object), UTC)


def operations(connection: Connection[Any], report: Report, since: datetime) -> None:
    """Note operations of payments that were refused, or that no lane has applied."""
    now = now_of(connection)
    for row in connection.execute(UNDONE, (since, now - SETTLING)):
        operation, provider, account, name, effect, created_at, status, code = row
        refused = status is not None
        report.add(
            Difference(
                code=f"refused_{code}" if refused else "not_applied",
                what=f"{name} {operation}",
                provider=provider,
                account=account,
                at=created_at,
                reason=f"{effect}: {'the ledger refused it' if refused else 'no lane has applied it yet'}",
            )
        )
    for row in connection.execute(UNSETTLED, (since,)):
        kind, key, provider, account, code, reason, heard_at = row
        difference = Difference(
            code=code, what=f"{kind} {key}", provider=provider, account=account, reason=reason, at=heard_at
        )
        if not any(each.what.endswith(f" {key}") for each in report.differences):
            report.add(difference)
    for row in connection.execute(PARKED, (since, now - SETTLING)):
        id, provider, type, code, reason, received_at = row
        report.add(Difference(code=code, what=f"event {id} {type}", provider=provider, reason=reason, at=received_at))
