"""The oracle: the one judge of every fault row, a program of its own.

It imports nothing of what it judges. It reads what the producers wrote down before they published, and the database
by plain SQL, and says what does not fit:

- **O1 exactly once**: the ids in the ledger are the ids published less those in quarantine, and those that follow from
  other operations (the credit side of a transfer); nothing twice;
- **O2 replay**: a second, slow ledger (``tests/oracle/model.py``), fed the operations in the ledger's order, gives
  every answer, entry, ``balance_after``, grant and hold; what senders were told is what the ledger says; every time
  stamp lies within the run, by the database's own clock;
- **O3 the closing identity**: ``==`` on both sides, per grant, per account and in all;
- **O4 order**: per account no gap in ``number`` and ``seq``, the chain of hashes unbroken, and the order is the order
  published;
- **O5 nothing left**: every lane is empty, ready and unacknowledged, and so is the outbox; every event of a provider
  is read, and nothing that it says waits;
- **O7 what is due**: without any ledger, each purchase has its credits once, less the share whose money was returned,
  and each plan that the calendar renews has given its credits at each of its instants, no earlier and none twice.

O6, that the fault hit at all, is counted by the rows themselves.

    CREDITLANE_DATABASE_URL=… python -m tests.faults.oracle models/catalogs/packs.toml PRODUCER_FILE…
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from calendar import monthrange
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import psycopg

from tests.oracle.model import BUCKETS, Row, meaning, micro
from tests.oracle.plans import PlanLedger, share
from tests.oracle.pools import PoolLedger
from tests.oracle.referring import ReferringLedger

MAX_FAULTS = 20
"""Faults that a judgement spells out; further ones are only counted."""

DEFAULT_DAYS = 30
"""How long refunded credits live unless the catalog says otherwise."""

PLAN: Row = {
    "unlimited": False,
    "mode": "reset",
    "source": "monthly",
    "rollover_source": "rollover",
    "rollover_cap": None,
    "balance_cap": None,
    "rollover_months": None,
    "interval": "month",
    "anchor": "subscription",
    "zone": None,
    "grace_days": 3,
    "upgrade": "difference",
}
"""What a plan is unless the catalog says otherwise."""

CAME_IN = BUCKETS[:3]

Key = tuple[str, str]
"""An account and an operation id: what is done once and no more."""


# --- What the producers wrote down -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sent:
    """One publication of one operation; a resending after an error is one of its own."""

    producer: str
    name: str
    account: str
    id: str
    arguments: Row
    reply: str | None
    """Under which name the answer was wanted."""

    @property
    def key(self) -> Key:
        """What makes it the same operation."""
        return self.account, self.id


@dataclass(frozen=True, slots=True)
class Poison:
    """One message that belongs in quarantine."""

    label: str
    queue: str
    digest: str
    """SHA-256 of the body that must be kept, in hex."""
    code: str


@dataclass(frozen=True, slots=True)
class Sold:
    """What a provider has sold."""

    sold: str
    """Its purchase."""
    account: str
    credits: str
    paid_minor: int
    returned_minor: int


@dataclass
class Record:
    """What all producers of a row published."""

    sent: list[Sent] = field(default_factory=list)
    poison: list[Poison] = field(default_factory=list)
    sold: list[Sold] = field(default_factory=list)
    swept: bool = False
    """Whether schedules settle idle accounts by themselves."""
    refused: int = 0
    """Publications that the broker did not confirm; each was repeated until it did."""
    unfinished: list[str] = field(default_factory=list)
    """Producers that have not said that they are done."""


def read_record(files: Iterable[Path]) -> Record:
    """Read producers' files, each line of which was written before what it tells of was published."""
    record = Record()
    for path in files:
        finished = False
        for line in path.read_text(encoding="utf-8").splitlines():
            noted = json.loads(line)
            if "sold" in noted:
                record.sold.append(Sold(**noted))
            elif "swept" in noted:
                record.swept = True
            elif "account" in noted:
                record.sent.append(Sent(*(noted[name] for name in Sent.__slots__)))
            elif "poison" in noted:
                record.poison.append(Poison(noted["poison"], noted["queue"], noted["digest"], noted["code"]))
            elif "refused" in noted:
                record.refused += 1
            else:
                finished = bool(noted["done"])
        if not finished:
            record.unfinished.append(path.name)
    return record


def read_policy(catalog: Path) -> Row:
    """A catalog file as the second ledger takes it; read here, not by the reader under test."""
    tables = tomllib.loads(catalog.read_text(encoding="utf-8"))
    catalog_zone = tables.get("catalog", {}).get("zone", "UTC")

    def welcome(name: str) -> Row:
        table = tables.get(name, {})
        return {
            "credits": micro(table.get("credits", 0)),
            "source": table.get("source", name),
            "expires_days": table.get("expires_days"),
        }

    return {
        "features": {
            name: {
                "price": micro(feature["price"]),
                "per": micro(feature.get("per", 1)),
                "rounding": feature.get("rounding", "exact"),
            }
            for name, feature in tables.get("features", {}).items()
        },
        "signup": welcome("signup"),
        "lead": welcome("lead"),
        "priorities": dict(tables.get("priorities", {})),
        "sources": {
            name: source["transferable"]
            for name, source in tables.get("sources", {}).items()
            if "transferable" in source
        },
        "packs": [
            {
                "name": name,
                "credits": micro(pack.get("credits", 0)),
                "minor": money(pack["price"])["minor"],
            }
            for name, pack in tables.get("packs", {}).items()
            if "price" in pack
        ],
        "zone": catalog_zone,
        "plans": {
            name: {
                **PLAN,
                **plan,
                "name": name,
                "credits": micro(plan.get("monthly_credits", 0)),
                "price": money(plan["price"]) if "price" in plan else None,
            }
            for name, plan in tables.get("plans", {}).items()
        },
        "pools": {"members": "any", "period": "month", **tables.get("pools", {}), "limit": None},
        "referrals": {
            name: micro(said) if name in ("referrer", "referee") else said
            for name, said in tables.get("referrals", {}).items()
        },
        "on_spent": tables.get("clawback", {}).get("on_spent", "debt"),
        "refund_days": tables.get("refunds", {}).get("refund_days", DEFAULT_DAYS),
    }


def money(price: str) -> Row:
    """Money as the catalog has it, of a currency with two decimals."""
    amount, currency = price.split()
    return {"minor": int(Fraction(amount) * 100), "currency": currency}


# --- What the ledger says ----------------------------------------------------------------------------

BUCKET_COLUMNS = ", ".join(f"{bucket}_micro" for bucket in BUCKETS)
QUERIES = {
    "accounts": f"SELECT account, operations, seq, head, debt_micro, {BUCKET_COLUMNS} FROM accounts ORDER BY account",
    "operations": "SELECT account, operation, number, name, status, code, charged_micro, first_seq, entries,"
    " arguments::text, result::text, applied_at FROM operations ORDER BY account, number",
    "entries": "SELECT account, seq, operation, kind, grant_id, amount_micro, balance_after_micro, at, refers_to,"
    " recorded_at, hash FROM entries ORDER BY account, seq",
    "grants": "SELECT account, grant_id, source, priority, features, effective_at, expires_at, purchase, origin,"
    f" clawed_back_micro, forgiven_micro, {BUCKET_COLUMNS} FROM grants ORDER BY account, grant_id",
    "holds": "SELECT account, hold, status, amount_micro FROM holds ORDER BY account, hold",
    "quarantine": "SELECT queue, code, encode(sha256(body), 'hex'), task, operation, reason FROM quarantine"
    " ORDER BY id",
    "outbox": "SELECT task, operation FROM outbox ORDER BY id",
    "payments": "SELECT account, operation, name, arguments::text FROM payment_operations ORDER BY number",
    "unread": "SELECT event_id, type, status, code FROM payment_events WHERE status NOT IN ('done', 'ignored')"
    " ORDER BY id",
    "unsettled": "SELECT kind, key, status, code FROM payment_facts WHERE status IN ('waiting', 'parked')"
    " ORDER BY kind, key",
    "clock": "SELECT ledger_now()",
}
"""All that is read, in one snapshot."""


LEFT = {
    "outbox": "messages are still in the outbox",
    "unread": "events of providers are not read",
    "unsettled": "facts about payments wait",
}
"""Tables of :data:`QUERIES` that must be empty in the end, and what it means where they are not."""

Tables = dict[str, list[tuple[Any, ...]]]
"""The rows of each table, by its name."""


def read_ledger(database: str) -> Tables:
    """Read every table in one snapshot.

    :raises psycopg.Error: when the database is away.
    """
    with psycopg.connect(database, options="-c timezone=UTC") as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        return read_tables(connection)


def read_tables(connection: psycopg.Connection[Any]) -> Tables:
    """Read every table in the transaction of a connection."""
    return {name: connection.execute(query).fetchall() for name, query in QUERIES.items()}


@dataclass(frozen=True, slots=True)
class Operation:
    """A row of ``operations``."""

    account: str
    id: str
    number: int
    name: str
    status: str
    code: str | None
    charged: int
    first_seq: int | None
    entries: int
    arguments: Row
    result: Row
    applied_at: datetime


def _operation(row: tuple[Any, ...]) -> Operation:
    *columns, arguments, result, applied_at = row
    values: list[Any] = [*columns, json.loads(arguments), json.loads(result), applied_at]
    return Operation(*values)


# --- The judgement -----------------------------------------------------------------------------------


@dataclass
class Judgement:
    """What was looked at, and what does not fit."""

    operations: int = 0
    """Operations in the ledger."""
    entries: int = 0
    quarantined: int = 0
    sent: int = 0
    """Publications, resendings and duplicates included."""
    answered: int = 0
    """Answers that senders were given."""
    replayed: int = 0
    """Answers that say that the operation was applied by an earlier delivery."""
    conflicts: int = 0
    """Answers that say that the id belongs to another operation."""
    fault_count: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return not self.fault_count

    def fault(self, check: str, what: str) -> None:
        """Note what does not fit, under the check that found it."""
        self.fault_count += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(f"{check}: {what}")


def judge(
    found: Tables,
    record: Record,
    policy: Row,
    *,
    left: int = 0,
    started: datetime | None = None,
    answers: Mapping[str, Row] | None = None,
    all_answered: bool = False,
    order: bool = True,
) -> Judgement:
    """Judge a ledger that has come to rest.

    :param found: what it holds; see :func:`read_ledger`.
    :param record: what was published.
    :param policy: the catalog in force; see :func:`read_policy`.
    :param left: messages that are in the lanes, ready or unacknowledged.
    :param started: by the database's clock: nothing may be stamped before it.
    :param answers: what senders were told, by the name under which they asked.
    :param all_answered: whether each that asked must have been told.
    :param order: whether the order published must have been kept; only where lanes were changed against the
        documented procedure, or two processes made to serve one lane unfenced, it need not.
    """
    operations = [_operation(row) for row in found["operations"]]
    verdict = Judgement(
        operations=len(operations),
        entries=len(found["entries"]),
        quarantined=len(found["quarantine"]),
        sent=len(record.sent),
    )
    published: dict[Key, list[Sent]] = {}
    for sent in record.sent:
        published.setdefault(sent.key, []).append(sent)
    letters = _replay(verdict, published, operations, found, policy)
    if record.swept:
        settled = {(each.account, each.id): each.name for each in operations if each.name == "credits.settle"}
        letters = {key: name for key, name in settled.items() if key not in published} | letters
    _exactly_once(verdict, published, letters, operations, record.poison, found["quarantine"])
    _within(verdict, operations, found["entries"], started, found["clock"][0][0])
    _closes(verdict, found["accounts"], found["grants"])
    _in_order(verdict, record.sent if order else [], operations, found)
    _answers(verdict, record.sent, operations, answers or {}, all_answered)
    if left:
        verdict.fault("O5", f"{left} messages are still in the lanes")
    for table, what in LEFT.items():
        # Who is killed leaves notices to a sweep, and only some acts have one; they move no credits.
        rows = [row for row in found[table] if record.swept or row[0] != "notices.deliver"]
        if rows:
            verdict.fault("O5", f"{len(rows)} {what}: {rows[0]}")
    _purchases(verdict, record.sold, found["grants"])
    _periods(verdict, operations, found, policy)
    return verdict


def _exactly_once(
    verdict: Judgement,
    published: Mapping[Key, Sequence[Sent]],
    letters: Mapping[Key, str],
    operations: Sequence[Operation],
    poison: Sequence[Poison],
    quarantine: Sequence[tuple[Any, ...]],
) -> None:
    times = Counter((operation.account, operation.id) for operation in operations)
    for key, count in times.items():
        if count > 1:
            verdict.fault("O1", f"{key} stands in the ledger {count} times")
        if key not in published and key not in letters:
            verdict.fault("O1", f"{key} is in the ledger and was never published")
    for key in letters.keys() - times.keys():
        verdict.fault("O1", f"{key}, a {letters[key]} that follows from another operation, is lost")
    for key in published.keys() - times.keys():
        verdict.fault("O1", f"{key} was published {len(published[key])} times and is lost")
    expected = Counter((each.queue, each.digest) for each in poison)
    labels = {(each.queue, each.digest): each for each in poison}
    kept = Counter((queue, digest) for queue, _, digest, *_ in quarantine)
    for place, count in expected.items():
        if kept[place] < count:
            verdict.fault("O1", f"poison {labels[place].label!r} in {place[0]} is neither applied nor in quarantine")
    for queue, code, digest, task, operation, reason in quarantine:
        known = labels.get((queue, digest))
        if known is None:
            verdict.fault("O1", f"a good message is in quarantine: {task} {operation!r} in {queue}, {code}: {reason}")
        elif known.code != code:
            verdict.fault("O1", f"poison {known.label!r} is quarantined as {code} instead of {known.code}")
        elif kept[queue, digest] > expected[queue, digest]:
            verdict.fault("O1", f"poison {known.label!r} stands in quarantine {kept[queue, digest]} times")


def _replay(
    verdict: Judgement,
    published: Mapping[Key, Sequence[Sent]],
    operations: Sequence[Operation],
    found: Tables,
    policy: Row,
) -> dict[Key, str]:
    """Replay every account.

    :returns: the operations that follow from others (the credit side of a transfer) or from payments, with their
        names: they are sent by what is judged itself.
    """
    letters: dict[Key, tuple[str, Row]] = {
        (account, id): (name, meaning(name, json.loads(arguments)))
        for account, id, name, arguments in found["payments"]
    }
    by_account = _grouped((operation.account, operation) for operation in operations)
    entries = _by_account(found["entries"])
    grants = _by_account(found["grants"])
    holds = _by_account(found["holds"])
    codes = GiftCodes(verdict, operations, entries, grants)
    owners = _owners(operations)
    for account, seen in _by_account(found["accounts"]).items():
        ledger = SecondLedger(policy, owners)
        try:
            letters |= _replay_account(
                verdict, account, ledger, published, by_account.get(account, []), entries.get(account, []), codes
            )
            _same_state(verdict, account, ledger, seen[0], grants.get(account, []), holds.get(account, []))
        except (AssertionError, KeyError, ValueError, TypeError, AttributeError) as error:
            verdict.fault("O2", f"{account}: the second ledger cannot follow: {type(error).__name__}: {error}")
    for operation in operations:
        name, content = letters.get((operation.account, operation.id), (operation.name, None))
        if content is None or (operation.account, operation.id) in published:
            continue
        if name != operation.name or _without_nothing(content) != meaning(name, operation.arguments):
            verdict.fault("O2", f"{operation.account}: {operation.id!r} is not what follows from the other operation")
    return {key: name for key, (name, _) in letters.items()}


class SecondLedger(ReferringLedger, PoolLedger):
    """One account of any kind, with all that accounts do. The catalogs of the faults limit no member of a pool."""


def _owners(operations: Iterable[Operation]) -> dict[str, str]:
    """Whose each referral code is: the first that an account was given; no two may have one of the same text."""
    first: dict[str, str] = {}
    for operation in operations:
        if operation.name == "referrals.issue" and operation.status == "applied":
            first.setdefault(operation.account, operation.arguments["code"])
    owners = {code: account for account, code in first.items()}
    if len(owners) < len(first):
        raise AssertionError("two accounts have one referral code")
    return owners


def _without_nothing(said: Any) -> Any:
    """A message's content without what is left out on the wire."""
    if isinstance(said, dict):
        return {name: _without_nothing(value) for name, value in said.items() if value is not None}
    return [_without_nothing(each) for each in said] if isinstance(said, list) else said


def _replay_account(
    verdict: Judgement,
    account: str,
    ledger: PlanLedger,
    published: Mapping[Key, Sequence[Sent]],
    operations: Sequence[Operation],
    entries: Sequence[tuple[Any, ...]],
    codes: GiftCodes,
) -> dict[Key, tuple[str, Row]]:
    """Feed the second ledger an account's operations, and what time did between them.

    :returns: what follows from them.
    """
    letters: dict[Key, tuple[str, Row]] = {}
    # A repetition settles the account as well, at a time that only its entries tell.
    settled = [row[8] for row in entries if row[1] is None]
    for operation in operations:
        while settled and settled[0] <= operation.applied_at:
            ledger.settle(settled.pop(0))
        said = [each.arguments for each in published.get((account, operation.id), ()) if each.name == operation.name]
        if operation.arguments not in said and (account, operation.id) in published:
            verdict.fault("O2", f"{account}: {operation.id!r} stands in the ledger with arguments nobody sent")
        codes.tell(ledger, operation)
        expected = ledger.do(operation.name, operation.id, operation.arguments, operation.applied_at)
        letters |= {(content["account"], id): (name, content) for name, id, content in ledger.letters}
        given = read_answer(operation.status, operation.code, operation.result)
        expected.pop("replayed")
        if given != expected:
            wrong = {name: (given.get(name), expected.get(name)) for name in given.keys() | expected.keys()
                     if given.get(name) != expected.get(name)}  # fmt: skip
            verdict.fault("O2", f"{account}: the answer to {operation.id!r} differs (ledger, replay): {wrong}")
        if operation.charged != expected["charged"]:
            verdict.fault("O2", f"{account}: {operation.id!r} is booked as {operation.charged} micro-credits")
    for instant in settled:
        ledger.settle(instant)
    made = [
        (
            m["operation"],
            m["kind"],
            m["lot"],
            m["amount"],
            m["balance_after"],
            m["at"],
            m["refers_to"],
            m["recorded_at"],
        )
        for m in ledger.movements
    ]
    written = [row[1:9] for row in entries]
    for place, (one, other) in enumerate(zip(written, made, strict=False), 1):
        if one != other:
            verdict.fault("O2", f"{account}: entry {place} is {one}, the replay has {other}")
            return letters
    if len(written) != len(made):
        verdict.fault("O2", f"{account}: {len(written)} entries, the replay has {len(made)}")
    return letters


class GiftCodes:
    """The gift codes of all accounts, as those were told that are replayed one by one.

    What an answer says of how often a code had been used is believed of that answer alone, and looked at here: no use
    is two accounts', and none is left out.
    """

    def __init__(
        self,
        verdict: Judgement,
        operations: Sequence[Operation],
        entries: Mapping[str, Sequence[tuple[Any, ...]]],
        grants: Mapping[str, Sequence[tuple[Any, ...]]],
    ) -> None:
        self.issued: dict[str, Row] = {}
        self.users: dict[str, dict[int, str]] = {}
        for operation in operations:
            if operation.status != "applied":
                continue
            if operation.name == "codes.issue":
                lots = {number: row for number, *row in grants.get(operation.account, [])}
                own = entries.get(operation.account, []) if operation.charged else []
                paid = [(lots[row[3]], row[4]) for row in own if row[1] == operation.id]
                self._issue(operation, paid)
            elif operation.name == "codes.redeem":
                text, slot = operation.arguments["code"], _told(operation.result["code_row"])
                other = self.users.setdefault(text, {}).setdefault(slot, operation.account)
                if other != operation.account:
                    verdict.fault("O1", f"use {slot} of the code {text} was given to {other} and {operation.account}")
        for text, users in self.users.items():
            if sorted(users) != list(range(len(users))) or len(users) > self.issued[text]["uses"]:
                verdict.fault("O1", f"the code {text} was used as {sorted(users)}")

    def _issue(self, operation: Operation, paid: list[tuple[list[Any], int]]) -> None:
        said = meaning(operation.name, operation.arguments)
        purse = list(paid)
        for text in said["codes"]:
            stubs = []
            for _ in range(said.get("uses", 1) if paid else 0):
                stub, missing = [], said["amount"]
                while missing:
                    lot, there = purse.pop(0)
                    part = min(there, missing)
                    stub.append({"source": lot[0], "priority": lot[1], "end": lot[4], "price": None, "amount": part})
                    missing -= part
                    if there > part:
                        purse.insert(0, (lot, there - part))
                stubs.append(stub)
            ends = [each["end"] for stub in stubs for each in stub if each["end"] is not None]
            life = timedelta(seconds=said.get("expires_in", 365 * 86400))
            self.issued[text] = {
                "by": operation.account, "issue": operation.id, "place": said["codes"].index(text), "stubs": stubs,
                "amount": said["amount"], "uses": said.get("uses", 1), "each": said.get("per_account", 1),
                "parcels": stubs, "closed": False, "life": said.get("credits_expire_in"),
                "end": min([said.get("expires_at", operation.applied_at + life), *ends]),
                "source": None if paid else said.get("source", "promotion"),
            }  # fmt: skip

    def tell(self, ledger: PlanLedger, operation: Operation) -> None:
        """Have a ledger know of codes what its account was told."""
        result = operation.result
        for text in result.get("existing", ()):
            ledger.codes[text] = {}
        seen = [*result.get("code_rows", ()), *([result["code_row"]] if "code_row" in result else ())]
        for row in (row for row in seen if row["terms"]["kind"] == "gift"):
            text, used = row["terms"]["code"], _told(row)
            users = [self.users.get(text, {}).get(slot, "") for slot in range(used)]
            known = ledger.codes.get(text) or self.issued[text]
            ledger.codes[text] = {**known, "users": users, "closed": row.get("status") == "closed"}


def _told(row: Row) -> int:
    """How often a code had been used, by what an answer says of its row."""
    return int(row.get("used", 0))


def _same_state(
    verdict: Judgement,
    account: str,
    ledger: PlanLedger,
    row: Sequence[Any],
    grants: Sequence[Sequence[Any]],
    holds: Sequence[Sequence[Any]],
) -> None:
    """The rows that are updated in place are what the replay ends with."""
    _, _, _, debt, *buckets = row
    totals = [sum(lot[bucket] for lot in ledger.lots) for bucket in BUCKETS]
    if buckets != totals or debt != ledger.debt:
        verdict.fault(
            "O2", f"{account}: buckets and debt are {(*buckets, debt)}, the replay's {(*totals, ledger.debt)}"
        )
    lots = [
        (lot["number"], lot["source"], lot["priority"], None if lot["scope"] is None else sorted(lot["scope"]),
         lot["start"], lot["end"], lot["purchase"], lot["origin"], lot["clawed_back"], lot["forgiven"],
         *(lot[bucket] for bucket in BUCKETS))
        for lot in ledger.lots
    ]  # fmt: skip
    seen = [(*each[:3], None if each[3] is None else sorted(each[3]), *each[4:]) for each in grants]
    for one, other in zip(seen, lots, strict=False):
        if one != other:
            verdict.fault("O2", f"{account}: grant {one} is {other} in the replay")
    if len(seen) != len(lots):
        verdict.fault("O2", f"{account}: {len(seen)} grants, the replay has {len(lots)}")
    standing = {hold: (status == "open", amount) for hold, status, amount in holds}
    expected = {name: (hold["open"], hold["amount"]) for name, hold in ledger.holds.items()}
    if standing != expected:
        verdict.fault("O2", f"{account}: holds are {standing}, the replay's {expected}")


def read_answer(status: str, code: str | None, result: Row) -> Row:
    """A stored result as the second ledger gives it: amounts in micro-credits, what is left out as nothing."""
    read: Row = {
        "status": status,
        "code": code,
        "charged": micro(result.get("charged", "0")),
        "uses": [(use["grant"], micro(use["amount"])) for use in result.get("grants", [])],
    }
    for amount in (
        "required", "available", "shortfall", "owed", "forgiven", "allotted", "expired", "taken_back", "restored",
        "frozen", "thawed", "bonus",
    ):  # fmt: skip
        if amount in result:
            read[amount] = micro(result[amount])
    for same in (
        "grant", "hold", "to", "sender", "transfer", "refused", "plan", "plan_status", "plan_next", "gift_code",
        "referral", "referral_code", "referrer", "referee",
    ):  # fmt: skip
        if same in result:
            read[same] = result[same]
    for instant in ("expires_at", "period_start", "period_end", "paid_until"):
        if instant in result:
            read[instant] = datetime.fromisoformat(result[instant])
    if "offer" in result:
        read["offer"] = result["offer"].get("pack", result["offer"].get("plan"))
    balance = result["balance"]
    read["balance"] = {
        **{
            each: micro(balance.get(each, "0"))
            for each in ("available", "held", "debt", "in_transit", "upcoming", "frozen")
        },
        "by_source": {source: micro(each) for source, each in balance.get("by_source", {}).items()},
    }
    return read


def _within(
    verdict: Judgement,
    operations: Sequence[Operation],
    entries: Sequence[tuple[Any, ...]],
    started: datetime | None,
    now: datetime,
) -> None:
    """No worker's clock is in any row: all times lie between the beginning and now."""
    stamps = [(f"{each.account}: {each.id!r}", each.applied_at) for each in operations]
    stamps += [(f"{row[0]}: entry {row[1]}", row[9]) for row in entries]
    for what, stamp in stamps:
        if stamp > now or (started is not None and stamp < started):
            verdict.fault("O2", f"{what} is stamped {stamp}, outside the run ({started} to {now})")


def _closes(verdict: Judgement, accounts: Sequence[tuple[Any, ...]], grants: Sequence[tuple[Any, ...]]) -> None:
    def check(what: str, buckets: Sequence[int]) -> None:
        came, went = sum(buckets[: len(CAME_IN)]), sum(buckets[len(CAME_IN) :])
        if came != went:
            verdict.fault("O3", f"{what} does not close: {came} came in, {went} are left and went out")

    sums: dict[str, list[int]] = {}
    for account, grant, *rest in grants:
        buckets = rest[-len(BUCKETS) :]
        check(f"{account}: grant {grant}", buckets)
        sums[account] = [one + other for one, other in zip(sums.get(account, [0] * len(BUCKETS)), buckets, strict=True)]
    total = [0] * len(BUCKETS)
    for account, *rest in accounts:
        buckets = rest[-len(BUCKETS) :]
        check(account, buckets)
        if buckets != sums.get(account, [0] * len(BUCKETS)):
            verdict.fault("O3", f"{account}: its buckets are not the sums of its grants'")
        total = [one + other for one, other in zip(total, buckets, strict=True)]
    check("the ledger", total)


def _purchases(verdict: Judgement, sold: Sequence[Sold], grants: Sequence[tuple[Any, ...]]) -> None:
    """Each purchase has come in once, and the share of it is gone whose money was returned; nothing else was bought."""
    lots: dict[str, list[tuple[str, int, int]]] = {}
    for account, _, _, _, _, _, _, purchase, origin, clawed_back, _, granted, *_ in grants:
        if purchase is not None and origin is None:
            lots.setdefault(purchase, []).append((account, granted, clawed_back))
    if not sold:
        return  # then purchases are what producers call so
    for each in sold:
        credits = micro(each.credits)
        expected = [(each.account, credits, credits * each.returned_minor // each.paid_minor)]
        came = lots.pop(each.sold, [])
        if came != expected:
            verdict.fault("O7", f"{each.sold} gave (account, credits, taken back) {came} instead of {expected}")
    for purchase, came in lots.items():
        verdict.fault("O7", f"{purchase} was never sold and gave {came}")


def _periods(verdict: Judgement, operations: Sequence[Operation], found: Tables, policy: Row) -> None:
    """A plan that the calendar renews has given its credits at the beginning of each period, and kept what it may.

    Of accounts that do nothing but use what their plan gives them; no period that has begun may lack.
    """
    entries = _by_account(found["entries"])
    available = {account: buckets[BUCKETS.index("available")] for account, _, _, _, _, *buckets in found["accounts"]}
    for account, own in _grouped((each.account, each) for each in operations).items():
        applied = [each for each in own if each.status == "applied"]
        if not applied or {each.name for each in applied[1:]} - {"credits.consume", "credits.settle"}:
            continue
        plan = policy["plans"].get(applied[0].arguments.get("plan"))
        if plan is None or plan["price"] is not None:
            continue
        starts = list(_starts(applied[0].applied_at, plan["zone"] or policy["zone"], found["clock"][0][0]))
        written = entries.get(account, [])
        gave = [(at, amount) for _, _, kind, _, amount, _, at, *_ in written if kind == "granted"]
        if gave != [(start, plan["credits"]) for start in starts]:
            verdict.fault("O7", f"{account} was given {gave} by {plan['name']}, whose periods begin {starts}")
        for seq, _, _, _, _, _, at, _, recorded_at, _ in written:
            if recorded_at < at:
                verdict.fault("O7", f"{account}: entry {seq} was written at {recorded_at}, before its time, {at}")
        left = _left(plan, starts, [(each.applied_at, each.charged) for each in applied])
        if available[account] != left:
            verdict.fault("O7", f"{account} has {available[account]} micro-credits of {plan['name']} instead of {left}")


def _starts(anchor: datetime, zone: str, until: datetime) -> Iterator[datetime]:
    """When the periods of a plan begin: on the same day of each month, or its last, by a clock on a wall of the zone.

    An hour that is shown twice is the first of the two; one that is never shown is as much later as clocks are put on.
    """
    wall = anchor.astimezone(ZoneInfo(zone))
    months = 0
    start = anchor
    while start <= until:
        yield start
        months += 1
        year, month = divmod(wall.month - 1 + months, 12)
        day = min(wall.day, monthrange(wall.year + year, month + 1)[1])
        start = wall.replace(year=wall.year + year, month=month + 1, day=day, fold=0).astimezone(UTC)


def _left(plan: Row, starts: Sequence[datetime], charges: Sequence[tuple[datetime, int]]) -> int:
    """Micro-credits that are left of a plan's after so many periods, and what was charged at which instants."""
    credits: int = plan["credits"]
    left = 0
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        if plan["mode"] == "reset":
            left = 0
        elif plan["mode"] == "rollover":
            cap = share(plan["balance_cap"], credits) - credits
            left = min(left, cap)
        left += credits - sum(charge for at, charge in charges if start <= at and (end is None or at < end))
    return left


def _in_order(
    verdict: Judgement,
    sent: Sequence[Sent],
    operations: Sequence[Operation],
    found: Tables,
) -> None:
    numbers = _grouped((operation.account, operation.number) for operation in operations)
    entries = _by_account(found["entries"])
    for account, (row,) in _by_account(found["accounts"]).items():
        last, seq, head, *_ = row
        if numbers.get(account, []) != list(range(1, last + 1)):
            verdict.fault("O4", f"{account}: its operations are not numbered 1 to {last} without a gap")
        own = entries.get(account, [])
        if [each[0] for each in own] != list(range(1, seq + 1)):
            verdict.fault("O4", f"{account}: its entries are not numbered 1 to {seq} without a gap")
        previous = b""
        for place, (*fields, hashed) in enumerate(own, 1):
            previous = sha256(previous + msgspec.msgpack.encode((account, *fields))).digest()
            if previous != bytes(hashed):
                verdict.fault("O4", f"{account}: entry {place} does not fit the chain")
                break
        if own and bytes(own[-1][-1]) != bytes(head):
            verdict.fault("O4", f"{account}: its head is not the hash of its last entry")
    places = {(operation.account, operation.id): place for place, operation in enumerate(operations)}
    for account, publications in _grouped((each.account, each) for each in sent).items():
        late = first_inversion(publications, places)
        if late is not None:
            verdict.fault("O4", f"{account}: {late[0]!r} was published before {late[1]!r} and applied after it")


def first_inversion(publications: Sequence[Sent], places: Mapping[Key, int]) -> tuple[str, str] | None:
    """Two operations of one account that the ledger has the wrong way round, if there are any.

    One must stand before another when every producer that published the other had published the one before: then
    it reached the lane first, however often and by whomever both were sent.

    :param publications: of one account, each producer's in its order.
    :param places: where the operations stand in the ledger.
    """
    by_producer = _grouped((each.producer, each.key) for each in publications)
    senders: dict[Key, list[str]] = {}
    for producer, keys in by_producer.items():
        for key in dict.fromkeys(keys):
            senders.setdefault(key, []).append(producer)
    before: dict[tuple[str, Key], set[Key]] = {}
    for producer, keys in by_producer.items():
        latest: Key | None = None
        seen: set[Key] = set()
        for key in dict.fromkeys(keys):
            if key not in places:
                continue  # lost, or in quarantine: not a matter of order
            if len(senders[key]) == 1:
                if latest is not None and places[latest] > places[key]:
                    return latest[1], key[1]
            else:
                before[producer, key] = set(seen)
            seen.add(key)
            if latest is None or places[key] > places[latest]:
                latest = key
    for key, producers in senders.items():
        if len(producers) > 1 and key in places:
            for earlier in set.intersection(*(before[producer, key] for producer in producers)):
                if places[earlier] > places[key]:
                    return earlier[1], key[1]
    return None


def _answers(
    verdict: Judgement,
    sent: Sequence[Sent],
    operations: Sequence[Operation],
    answers: Mapping[str, Row],
    all_answered: bool,
) -> None:
    """What a sender was told is what the ledger says, for ever."""
    ledger = {(operation.account, operation.id): operation for operation in operations}
    asked = {each.reply: each for each in sent if each.reply is not None}
    for reply, each in asked.items():
        told = answers.get(reply)
        if told is None:
            if all_answered:
                verdict.fault("O2", f"{each.account}: the sender of {each.id!r} was never told what became of it")
            continue
        verdict.answered += 1
        operation = ledger.get(each.key)
        if told.get("status") != "SUCCESS" or operation is None:
            verdict.fault("O2", f"{each.account}: {each.id!r} was answered {told}, the ledger has {operation}")
            continue
        result = dict(told["result"])
        same = operation.name == each.name and (
            meaning(operation.name, operation.arguments) == meaning(each.name, each.arguments)
        )
        if result.get("code") == "id_conflict":
            verdict.conflicts += 1
            if same:
                verdict.fault("O2", f"{each.account}: {each.id!r} was refused as a conflict with itself")
            continue
        verdict.replayed += result.pop("replayed", False)
        head = {name: result.pop(name) for name in ("operation", "id", "status", "account")}
        if not same:
            verdict.fault(
                "O2", f"{each.account}: {each.id!r} was sent with other content and not refused as a conflict"
            )
        elif head["status"] != operation.status or result != operation.result:
            verdict.fault("O2", f"{each.account}: the sender of {each.id!r} was told {told}, the ledger says otherwise")


def _grouped(pairs: Iterable[tuple[str, Any]]) -> dict[str, list[Any]]:
    grouped: dict[str, list[Any]] = {}
    for key, value in pairs:
        grouped.setdefault(key, []).append(value)
    return grouped


def _by_account(rows: Iterable[tuple[Any, ...]]) -> dict[str, list[tuple[Any, ...]]]:
    return _grouped((row[0], row[1:]) for row in rows)


def main() -> None:
    """Judge the ledger of ``CREDITLANE_DATABASE_URL`` by a catalog and producers' files; exits with 1 for faults."""
    catalog, *files = map(Path, sys.argv[1:])
    ledger = read_ledger(os.environ["CREDITLANE_DATABASE_URL"])
    verdict = judge(ledger, read_record(files), read_policy(catalog))
    print(msgspec.json.format(msgspec.json.encode(verdict)).decode())
    raise SystemExit(not verdict.holds)


if __name__ == "__main__":
    main()
