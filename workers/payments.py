"""From the inbox to the lanes: what providers' events say, and the operations that it amounts to.

An event is read and its object fetched again outside of any transaction. What it says is then noted, and what all that
is known amounts to is kept and sent, by one session at a time, so that operations reach the lanes in the order in which
they were made. An event that cannot be read is parked, with a code and a sentence, for an operator; one whose object is
out of reach is tried again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import NAMESPACE_OID, uuid5

import msgspec
import psycopg
from celery import shared_task
from celery.utils.log import get_task_logger
from psycopg import Connection

from creditlane.client import NOTICES, PAYMENTS, SHOWN_CHARACTERS, task_message
from creditlane.events import EXCHANGE, PAYMENT_SETTLED, matching
from creditlane.sending import Outgoing
from models.cutoff import BusyError, try_alone
from models.database import connect
from models.in_force import catalog_in_force
from models.payments import Message, Settled, TooManyFactsError, alone, now_of, record, settle
from models.rules.catalog import Catalog
from models.rules.state import Notice
from models.settings import settings
from workers.crash import crash_point
from workers.ledger_writer import insert_notices, insert_outbox
from workers.notices import sender
from workers.outbox import DELIVER, Outbox, OutboxRow
from workers.providers.base import Adapter, Fetch, Parked, VerificationError, no_fetch
from workers.receiving import APPLY, configured
from workers.reconciling import Reconciler, Report, operations
from workers.stripe_api import StripeApiError, UnavailableError, make_stripe_api

logger = get_task_logger(__name__)

LOOK, RECONCILE = "payments.look", "payments.reconcile"

LOOK_BACK_DAYS = 31
"""How far back a report tells of what was refused, waits or is parked."""

RETRY_SECONDS = (30, 120, 600, 1800, 7200, 21_600, 43_200, 86_400, 86_400)
"""How long after each failure an event is read again, more or less: three days in all. Then it is parked."""

JITTER = 0.2
"""What of that is left to chance."""

EVENT = "SELECT provider, body, attempts FROM payment_events WHERE id = %s AND status = 'received'"
HOLD_EVENT = "SELECT FROM payment_events WHERE id = %s AND status = 'received' FOR UPDATE"
END_EVENT = """
UPDATE payment_events SET status = %(status)s, code = %(code)s, reason = %(reason)s, attempts = attempts + %(failed)s,
       next_attempt_at = ledger_now() + %(pause)s,
       done_at = CASE WHEN %(status)s = 'received' THEN NULL ELSE ledger_now() END
WHERE id = %(event)s AND status = 'received'
"""
SEQ = "SELECT seq FROM accounts WHERE account = %s"
OLDER = "SELECT EXISTS (SELECT FROM outbox WHERE exchange = '' AND account = ANY(%s) AND id < %s)"


class End(msgspec.Struct, frozen=True):
    """What became of reading an event."""

    status: str
    code: str | None = None
    reason: str | None = None
    pause: timedelta | None = None
    """When it is read again."""


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an event, as its task answers."""

    status: str
    code: str | None = None
    reason: str | None = None
    facts: int = 0
    operations: list[str] = []
    """Ids of the operations that were sent because of it."""
    missing: list[str] = []
    """Subscriptions of which an earlier payment is not known."""


NOTHING_TO_DO = Done(status="nothing to do")


class Processor:
    """Reads events, and sends what they amount to.

    :param readers: the adapters, by the provider's name.
    :param fetches: how the objects of a provider are fetched again, where they can be.
    :param outbox: sends what was committed.
    :param events: the types of events to publish, see :func:`creditlane.events.matching`.
    """

    def __init__(
        self,
        connection: Connection[Any],
        readers: Mapping[str, Adapter],
        fetches: Mapping[str, Fetch],
        catalog: Catalog,
        outbox: Outbox,
        events: frozenset[str] = frozenset(),
    ) -> None:
        self._connection = connection
        self._readers = readers
        self._fetches = fetches
        self._catalog = catalog
        self._outbox = outbox
        self._events = events

    def apply(self, event: int) -> Done:
        """Read an event of the inbox, and send what follows.

        :param event: its row.
        :raises psycopg.Error: when the database is away; a sweep comes back to it.
        """
        row = self._connection.execute(EVENT, (event,)).fetchone()
        if row is None:
            return NOTHING_TO_DO
        provider, body, attempts = row
        facts = self._read(provider, bytes(body), attempts)
        if isinstance(facts, End):
            return self._concluded(event, facts)
        with alone(self._connection):
            with self._connection.transaction():
                if self._connection.execute(HOLD_EVENT, (event,)).fetchone() is None:
                    return NOTHING_TO_DO
                try:
                    with self._connection.transaction():
                        groups = record(self._connection, facts, event)
                        settled, rows = self._settle(groups)
                except TooManyFactsError as error:
                    return self._concluded(event, End("parked", "too_many", str(error)))
                except psycopg.OperationalError:
                    raise
                except Exception as error:
                    logger.exception("payment event %d", event)
                    reason = f"{type(error).__name__}: see the log, then retry"
                    return self._concluded(event, End("parked", "internal_error", reason))
                self._end(event, End("done" if facts else "ignored"))
                crash_point("payment-before-commit")
            crash_point("payment-after-commit")
            self._publish(rows)
        return Done(
            status="done" if facts else "ignored",
            facts=len(facts),
            operations=[message[3] for each in settled for message in each.messages],
            missing=sorted({name for each in settled for name in each.resolution.missing}),
        )

    def look(self, groups: Sequence[int]) -> list[str]:
        """Settle groups anew: something of them has waited long enough, or an operator has mended what was wrong.

        :returns: ids of the operations that were sent.
        """
        sent: list[str] = []
        for group in groups:
            with alone(self._connection):
                with self._connection.transaction():
                    settled, rows = self._settle({group})
                self._publish(rows)
            sent += [message[3] for each in settled for message in each.messages]
        return sent

    def _read(self, provider: str, body: bytes, attempts: int) -> tuple[Any, ...] | End:
        """The facts of an event, or why there are none."""
        adapter = self._readers.get(provider)
        if adapter is None:
            return End("parked", "not_configured", f"this worker has no secrets of {provider}: set them, then retry")
        try:
            facts = adapter.normalise(adapter.read(body), self._fetches.get(provider, no_fetch))
        except VerificationError as error:
            return End("parked", error.code, error.sentence)
        except UnavailableError as error:
            return self._again(attempts, str(error))
        except StripeApiError as error:
            return End("parked", error.code, str(error))
        except Exception as error:
            logger.exception("an event of %s", provider)
            return End("parked", "internal_error", f"{type(error).__name__}: see the log, then retry")
        if isinstance(facts, Parked):
            return End("parked", facts.code, facts.reason)
        return facts

    @staticmethod
    def _again(attempts: int, reason: str) -> End:
        if attempts >= len(RETRY_SECONDS):
            return End("parked", "provider_away", reason)
        seconds = RETRY_SECONDS[attempts] * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - nothing secret
        logger.warning("an event is read again in %.0f s: %s", seconds, reason)
        return End("received", "provider_away", reason, timedelta(seconds=seconds))

    def _end(self, event: int, end: End) -> None:
        if end.status == "parked":
            logger.warning("payment event %d is parked: %s: %s", event, end.code, end.reason)
        values = msgspec.structs.asdict(end) | {"event": event, "failed": int(end.status == "received")}
        self._connection.execute(END_EVENT, values)

    def _concluded(self, event: int, end: End) -> Done:
        self._end(event, end)
        return Done(status=end.status, code=end.code, reason=end.reason)

    def _settle(self, groups: set[int]) -> tuple[list[Settled], list[OutboxRow]]:
        """Keep what groups amount to, and its messages and notices."""
        found = [settle(self._connection, group, self._catalog) for group in sorted(groups)]
        settled = [each for each in found if each is not None]
        messages = [message for each in settled for message in each.messages]
        channels = self._catalog.notify.channels
        notices = [
            (each.resolution.account, Notice(told.kind, told.key, told.at, told.details))
            for each in settled
            for told in each.resolution.notices
            if each.resolution.account is not None and told.kind in self._catalog.notify.kinds
        ]
        now = now_of(self._connection)
        if PAYMENT_SETTLED in self._events:
            messages += [message for each in settled for message in self._told(each, now)]
        with self._connection.cursor() as cursor:
            for account, notice in notices:
                insert_notices(cursor, [(account, notice)], channels, now)
                if cursor.rowcount and channels:
                    arguments = msgspec.json.encode({"account": account, "key": notice.key})
                    messages.append((account, NOTICES, DELIVER, notice.key, arguments))
            rows = insert_outbox(cursor, messages, now) if messages else []
        return settled, rows

    def _told(self, settled: Settled, now: datetime) -> Iterator[Message]:
        """The events of what was paid for."""
        for (account, _, name, operation, arguments), effect in zip(settled.messages, settled.effects, strict=True):
            if not effect.key.startswith(("grant:", "period:")):
                continue
            row = self._connection.execute(SEQ, (account,)).fetchone()
            details = {"purchase": effect.purchase, "name": name, **msgspec.json.decode(arguments)}
            event = {
                "id": operation, "type": PAYMENT_SETTLED, "account": account, "seq": 0 if row is None else row[0],
                "at": now, "operation": operation, "details": details,
            }  # fmt: skip
            yield account, EXCHANGE, PAYMENT_SETTLED, operation, msgspec.json.encode(event)

    def _publish(self, rows: Sequence[OutboxRow]) -> None:
        """Send what was committed, unless something for these accounts was left behind: then a sweep sends all."""
        if not rows:
            return
        row = self._connection.execute(OLDER, ([each.account for each in rows], rows[0].id)).fetchone()
        assert row is not None
        if not row[0]:
            self._outbox.publish(rows)


class Working(NamedTuple):
    """What a task on payments works with."""

    connection: Connection[Any]
    processor: Processor
    reconciler: Reconciler | None
    """None without an API key."""


@contextmanager
def working() -> Iterator[Working]:
    """Work on payments, on a database connection of its own."""
    config = settings()
    readers = configured()
    api = make_stripe_api(config) if "stripe" in readers else None
    with connect(config.database_url.get_secret_value(), "creditlane payments", read_only=False) as connection:
        processor = Processor(
            connection,
            readers,
            {} if api is None else {"stripe": api.fetch},
            catalog_in_force(connection),
            Outbox(connection, sender(), config.lanes),
            matching(config.events),
        )
        reconciler = None
        if api is not None:
            reconciler = Reconciler(connection, api, readers["stripe"], processor.apply, config.payments_livemode)
        yield Working(connection, processor, reconciler)


@shared_task(name=APPLY)
def apply(event: int) -> dict[str, Any]:
    """Read an event of the inbox, and send the operations that it leads to.

    A payment before it that was not heard of is asked for, where there is an API key.

    :param event: its row in the inbox.
    :returns: its ``status``; with ``code`` and ``reason`` where it is parked or tried again, else the ids of the
        ``operations``.
    :raises psycopg.Error: when the database is away; a sweep sends it again.
    """
    with working() as work:
        done = work.processor.apply(event)
        for subscription in done.missing:
            if work.reconciler is not None:
                _look_up(work.reconciler, subscription)
    answer: dict[str, Any] = msgspec.to_builtins(done)
    return {name: value for name, value in answer.items() if value}


def _look_up(reconciler: Reconciler, subscription: str) -> None:
    try:
        reconciler.look_up(subscription)
    except StripeApiError as error:
        logger.warning("the payments for %r are not known: %s", subscription, error)


@shared_task(name=LOOK)
def look(groups: list[int]) -> dict[str, Any]:
    """Settle groups of facts anew, of which something has waited.

    :param groups: their ids.
    :returns: the ids of the ``operations`` that were sent.
    """
    with working() as work:
        return {"operations": work.processor.look(groups)}


@shared_task(name=RECONCILE, bind=True)
def reconcile(self: Any, deep: bool = False, days: int = LOOK_BACK_DAYS) -> dict[str, Any]:
    """Compare the provider with the ledger, take up what was never heard of, and report in what they differ.

    :param deep: whether to compare the objects of weeks, and not from the last time.
    :param days: how far back what was refused, waits or is parked is reported.
    :returns: a :class:`workers.reconciling.Report` as JSON has it.
    :raises StripeApiError: when the provider is out of reach, or refuses.
    """
    report = Report()
    with working() as work:
        if not try_alone(work.connection, "reconciling payments"):
            raise BusyError("payments are being reconciled by another worker; wait until it is done")
        if work.reconciler is not None:
            work.reconciler.run(
                report,
                deep=deep,
                progress=lambda kind, count: self.update_state(state="PROGRESS", meta={"kind": kind, "count": count}),
            )
        operations(work.connection, report, now_of(work.connection) - timedelta(days=days))
    if report.total:
        logger.warning("payments: the provider and the ledger differ in %d points", report.total)
    told: dict[str, Any] = msgspec.to_builtins(report)
    return told


def task(name: str, id: str, **arguments: Any) -> Outgoing:
    """A message for the queue of payments.

    :param id: what makes it one.
    """
    shown = ", ".join(map(str, arguments.values()))[:SHOWN_CHARACTERS]
    return task_message(name, str(uuid5(NAMESPACE_OID, id)), PAYMENTS, msgspec.json.encode(arguments), shown)
