"""What the tests of the audit, the replay and the seals share: a ledger with a life, and whoever tampers with it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from creditlane.contract import decode_message
from models.report import Report
from models.rules.posting import chain_hash
from models.rules.state import Entry
from tests.support import Ledger
from workers.ledger_writer import Job

START = datetime(2026, 1, 31, 12, tzinfo=UTC)


def job(name: str, identity: str, /, **arguments: Any) -> Job:
    """One operation, ready to be written."""
    raw = msgspec.json.encode(arguments)
    return Job(name, identity, decode_message(name, raw), raw)


def freeze(ledger: Ledger, instant: datetime) -> None:
    """Let the ledger's clock stand still."""
    ledger.writer.connection.execute(
        "CREATE OR REPLACE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql VOLATILE"
        f" AS 'SELECT timestamptz ''{instant.isoformat()}'''"
    )


def live(ledger: Ledger, *accounts: str) -> None:
    """A life with an entry of every kind, a refusal, an open and a closed hold, for each account."""
    freeze(ledger, START)
    for name in accounts:
        ledger.write(
            job("credits.open", "open", account=name),  # 1: granted
            job("credits.grant", "g", account=name, amount=10, source="pack", purchase="p", expires_in=3600),  # 2
            job("credits.consume", "c", account=name, amount=55),  # 3 and 4
            job("credits.hold", "h", account=name, amount=2),  # 5
            job("credits.capture", "k", account=name, hold="h", amount=1),  # 6 released, 7 captured
            job("credits.refund", "r", account=name, operation="c", amount=3),  # 8 restored
            job("credits.consume", "no", account=name, amount=1000),
        )
        ledger.write(
            job("credits.revoke", "v", account=name, purchase="p", amount=9),  # revoked and debt_incurred
            job("credits.grant", "g-2", account=name, amount=20, source="pack"),  # granted, debt_paid
            job("credits.hold", "open-hold", account=name, amount=2, ttl=86400),
            job("credits.grant", "g-3", account=name, amount=5, source="promo", expires_in=60),
        )
    freeze(ledger, START + timedelta(hours=2))
    ledger.write(*(job("credits.settle", "s", account=name) for name in accounts))  # expired


def tamper(ledger: Ledger, *statements: str) -> None:
    """Change rows as an owner of the tables can who puts the triggers out of action first."""
    connection = ledger.writer.connection
    with connection.transaction():
        connection.execute("SET LOCAL session_replication_role = replica")
        for statement in statements:
            connection.execute(statement)


def rewrite_chain(ledger: Ledger, account: str) -> None:
    """Make the chain of an account fit its entries again, as an owner can who knows how it is made."""
    connection = ledger.writer.connection
    entries = connection.execute(
        "SELECT seq, operation, kind, grant_id, amount_micro, balance_after_micro, at, refers_to, recorded_at, hash"
        " FROM entries WHERE account = %s ORDER BY seq",
        (account,),
    ).fetchall()
    previous = b""
    with connection.transaction():
        connection.execute("SET LOCAL session_replication_role = replica")
        for row in entries:
            previous = chain_hash(previous, account, Entry(*row))
            connection.execute(
                "UPDATE entries SET hash = %s WHERE account = %s AND seq = %s", (previous, account, row[0])
            )
        connection.execute("UPDATE accounts SET head = %s WHERE account = %s", (previous, account))


def named(report: Report) -> set[tuple[str, str, str]]:
    """Which rows a report names."""
    return {(fault.account, fault.table, fault.key) for fault in report.faults}
