"""The rules against a second ledger that shares no code with them, step by step, on random operations.

``CREDITLANE_HYPOTHESIS=thorough`` runs ten times as many, and other ones each time. Hypothesis would spend
minutes on making a failing run smaller; here operations are left out one by one while it still fails.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from hashlib import sha256
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from creditlane.contract import decode_message
from models.catalog import parse_catalog
from models.rules.catalog import Catalog, Money, Plan
from models.rules.state import CLOSED, COUNTERS, FROZEN, UNOPENED, Account, Entry, achieved_at
from tasks.ledger import Answer, apply, encode
from tests.oracle.model import BUCKETS, Row, meaning
from tests.oracle.plans import PlanLedger
from tests.oracle.pools import PoolLedger

THOROUGH = os.environ.get("CREDITLANE_HYPOTHESIS") == "thorough"
COMMON = settings(
    deadline=None,
    database=None,
    derandomize=not THOROUGH,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
STEPS = settings(COMMON, max_examples=3000 if THOROUGH else 300, stateful_step_count=40)
SEQUENCES = settings(COMMON, max_examples=2000 if THOROUGH else 200)
CLAWBACKS = settings(COMMON, max_examples=10_000 if THOROUGH else 1000)

START = datetime(2026, 1, 31, 12, tzinfo=UTC)
ACCOUNT = "kontó-1"

CATALOG = """
[catalog]
name = "oracle"
[signup]
credits = "6"
expires_days = 2
[lead]
credits = "2.5"
source = "lead"
[priorities]
signup = 10
pack = 50
bonus = 50
[sources.bonus]
transferable = true
[sources.other]
transferable = false
[features.image]
price = "1"
per = "8"
[features.block]
price = "0.7"
per = "3"
rounding = "up"
[features.third]
price = "1"
per = "3"
[features.export]
price = "0"
[packs.small]
credits = "5"
price = "4.99 EUR"
[packs.same]
credits = "6"
price = "4.99 EUR"
[packs.large]
credits = "25"
price = "14.99 EUR"
[packs.quote]
quote_above = "500"
[clawback]
on_spent = "{on_spent}"
[refunds]
refund_days = 2
"""

ACHIEVEMENTS = """
[achievements.all_of_ten]
at = "10"
credits = "4"
expires_days = 1
[achievements.badge]
at = "3"
[achievements.first]
at = "3"
credits = "1.5"
[achievements.friends]
measure = "referrals"
at = "1"
credits = "100"
"""

CATALOGS = {
    on_spent: parse_catalog(CATALOG.replace("{on_spent}", on_spent), "oracle.toml") for on_spent in ("debt", "forgive")
}
ACHIEVED = parse_catalog(CATALOG.replace("{on_spent}", "debt") + ACHIEVEMENTS, "achieved.toml")


def plain(catalog: Catalog) -> Row:
    """A catalog as the second ledger takes it."""
    return {
        "features": {
            name: {"price": int(feature.price), "per": int(feature.per), "rounding": feature.rounding}
            for name, feature in catalog.features.items()
        },
        "signup": {
            "credits": int(catalog.signup.credits),
            "source": catalog.signup.source,
            "expires_days": catalog.signup.expires_days,
        },
        "lead": {
            "credits": int(catalog.lead.credits),
            "source": catalog.lead.source,
            "expires_days": catalog.lead.expires_days,
        },
        "priorities": dict(catalog.priorities),
        "sources": {name: source.transferable for name, source in catalog.sources.items()},
        "packs": [
            {"name": name, "credits": int(pack.credits), "minor": Money.parse(pack.price).minor}
            for name, pack in catalog.packs.items()
            if pack.price is not None
        ],
        "achievements": [
            {
                "name": name,
                "at": int(each.at),
                "credits": int(each.credits),
                "expires_days": each.expires_days,
            }
            for name, each in catalog.achievements.items()
            if each.measure == "used"
        ],
        "on_spent": catalog.clawback.on_spent,
        "refund_days": catalog.refunds.refund_days,
        "pools": {
            "members": catalog.pools.members,
            "limit": None if catalog.pools.member_limit is None else int(catalog.pools.member_limit),
            "period": catalog.pools.period,
        },
        "zone": catalog.catalog.zone,
        "plans": {name: plain_plan(name, plan) for name, plan in catalog.plans.items()},
    }


def plain_plan(name: str, plan: Plan) -> Row:
    """A plan in the catalog's own words."""
    price = None if plan.price is None else Money.parse(plan.price)
    return {
        **msgspec.structs.asdict(plan),
        "name": name,
        "credits": int(plan.monthly_credits),
        "price": None if price is None else {"minor": price.minor, "currency": price.currency},
    }


# What the proof says, once more: the chain, the buckets, the closing identity.


def packed(value: Any) -> bytes:
    """MessagePack of what an entry holds, written from the format's specification."""
    if value is None:
        return b"\xc0"
    if isinstance(value, int):
        assert value >= 0
        for limit, head, size in ((1 << 8, b"\xcc", 1), (1 << 16, b"\xcd", 2), (1 << 32, b"\xce", 4)):
            if value < 128:
                return bytes([value])
            if value < limit:
                return head + value.to_bytes(size, "big")
        return b"\xcf" + value.to_bytes(8, "big")
    if isinstance(value, str):
        text = value.encode("utf-8")
        if len(text) < 32:
            return bytes([0xA0 | len(text)]) + text
        if len(text) < 256:
            return b"\xd9" + bytes([len(text)]) + text
        return b"\xda" + len(text).to_bytes(2, "big") + text
    assert isinstance(value, datetime)
    since = value - datetime(1970, 1, 1, tzinfo=UTC)
    seconds, nanoseconds = since.days * 86400 + since.seconds, since.microseconds * 1000
    if 0 <= seconds < 1 << 34:
        if not nanoseconds and seconds < 1 << 32:
            return b"\xd6\xff" + seconds.to_bytes(4, "big")
        return b"\xd7\xff" + (nanoseconds << 34 | seconds).to_bytes(8, "big")
    return b"\xc7\x0c\xff" + nanoseconds.to_bytes(4, "big") + seconds.to_bytes(8, "big", signed=True)


def chained(previous: bytes, account: str, entry: Entry) -> bytes:
    """The hash that an entry must have: over the one before it, the account, and every field in order."""
    fields = (
        account,
        entry.seq,
        entry.operation,
        entry.kind,
        entry.grant,
        entry.amount_micro,
        entry.balance_after_micro,
        entry.at,
        entry.refers_to,
        entry.recorded_at,
    )
    body = bytes([0x90 | len(fields)]) + b"".join(packed(each) for each in fields)
    return sha256(previous + body).digest()


MOVES: dict[str, dict[str, int]] = {
    "granted": {"granted": 1, "available": 1},
    "restored": {"restored": 1, "available": 1},
    "consumed": {"available": -1, "consumed": 1},
    "held": {"available": -1, "held": 1},
    "captured": {"held": -1, "consumed": 1},
    "released": {"held": -1, "available": 1},
    "expired": {"available": -1, "expired": 1},
    "revoked": {"available": -1, "revoked": 1},
    "transferred": {"available": -1, "in_transit": 1},
    "sent": {"in_transit": -1, "sent": 1},
    "bounced": {"in_transit": -1, "available": 1},
    "received": {"received": 1, "available": 1},
    "rolled_out": {"available": -1, "sent": 1},
    "rolled_in": {"received": 1, "available": 1},
    "unexpired": {"expired": -1, "available": 1},
    "debt_incurred": {"debt": 1},
    "debt_paid": {"available": -1, "revoked": 1, "debt": -1},
    "debt_cancelled": {"debt": -1},
    "reinstated": {"revoked": -1, "available": 1},
}


@dataclass
class Auditor:
    """Reads the entries of an account as they come and says what its buckets must be."""

    read: int = 0
    head: bytes = b""
    totals: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*BUCKETS, "debt"), 0))
    grants: dict[int, dict[str, int]] = field(default_factory=dict)

    def check(self, account: Account) -> None:
        """Read on, then compare every bucket, the chain's head and the closing identity."""
        for entry in account.entries[self.read :]:
            self.read += 1
            assert entry.seq == self.read
            assert entry.amount_micro > 0
            assert entry.at <= entry.recorded_at
            grant = self.grants.setdefault(entry.grant, dict.fromkeys((*BUCKETS, "debt"), 0))
            for bucket, sign in MOVES[entry.kind].items():
                grant[bucket] += sign * entry.amount_micro
                self.totals[bucket] += sign * entry.amount_micro
                assert bucket == "debt" or grant[bucket] >= 0
            assert self.totals["debt"] >= 0
            assert entry.balance_after_micro == self.totals["available"]
            self.head = chained(self.head, account.account, entry)
            assert entry.hash == self.head
        assert account.seq == self.read
        assert account.head == self.head
        assert tuple(COUNTERS) == BUCKETS
        for bucket in BUCKETS:
            assert getattr(account, bucket) == self.totals[bucket], bucket
            assert sum(getattr(grant, bucket) for grant in account.grants.values()) == self.totals[bucket]
        assert account.debt == self.totals["debt"]
        closes(account)
        adds_up(account)
        for number, seen in account.grants.items():
            closes(seen)
            expected = self.grants[number]
            assert {bucket: getattr(seen, bucket) for bucket in BUCKETS} == {
                bucket: expected[bucket] for bucket in BUCKETS
            }


def closes(of: Any) -> None:
    """The closing identity of a grant or an account."""
    came = of.granted + of.received + of.restored
    went = of.available + of.held + of.in_transit + of.consumed + of.expired + of.revoked + of.sent
    assert came == went


def adds_up(account: Account) -> None:
    """What its owner has is what was given and not taken back, less what was used, is held or lapsed.

    What was forgiven counts as given until it comes back; the debt counts against what there is.
    """
    lots = account.grants.values()
    given = sum(lot.granted + lot.received - lot.clawed_back + lot.forgiven for lot in lots)
    gone = sum(lot.consumed - lot.restored + lot.held + lot.expired + lot.in_transit + lot.sent for lot in lots)
    assert account.available - account.debt == given - gone


# Both ledgers, one operation at a time.


def credits_of(text: str) -> int:
    exact = Fraction(text) * 1_000_000
    assert exact.denominator == 1
    return int(exact)


def read_answer(answer: Answer) -> Row:
    """A result as the second ledger gives it: amounts in micro-credits, what is left out as nothing."""
    said: Row = json.loads(answer.result)
    read: Row = {
        "status": said["status"],
        "code": said.get("code"),
        "charged": credits_of(said.get("charged", "0")),
        "uses": [(use["grant"], credits_of(use["amount"])) for use in said.get("grants", [])],
        "replayed": said.get("replayed", False),
    }
    for amount in (
        "required", "available", "shortfall", "owed", "forgiven", "allotted", "expired", "taken_back", "restored",
        "frozen", "thawed", "limit",
    ):  # fmt: skip
        if amount in said:
            read[amount] = credits_of(said[amount])
    for same in ("grant", "hold", "to", "sender", "transfer", "refused", "plan", "plan_status", "plan_next",
                 "converted_to", "account_status", "gift_code", "member"):  # fmt: skip
        if same in said:
            read[same] = said[same]
    for instant in ("expires_at", "period_start", "period_end", "paid_until"):
        if instant in said:
            read[instant] = datetime.fromisoformat(said[instant])
    if "achieved" in said:
        read["achieved"] = [
            (each["achievement"], credits_of(each["credits"]), each.get("grant")) for each in said["achieved"]
        ]
    if "offer" in said:
        read["offer"] = said["offer"].get("pack", said["offer"].get("plan"))
    if "allowance" in said:
        read["allowance"] = {
            name: datetime.fromisoformat(value) if name in ("since", "period_end") else
            credits_of(value) if name in ("counted", "limit", "left") else value
            for name, value in said["allowance"].items()
        }  # fmt: skip
    balance = said.get("balance")
    if balance is not None:
        read["balance"] = {
            **{
                each: credits_of(balance.get(each, "0"))
                for each in ("available", "held", "debt", "upcoming", "in_transit", "frozen")
            },
            "by_source": {source: credits_of(each) for source, each in balance.get("by_source", {}).items()},
        }
    return read


Step = tuple[datetime, str, str, Row]
"""When, which operation, its id and its content."""


@dataclass
class Both:
    """An account in the rules and in the second ledger."""

    catalog: Catalog
    name: str = ACCOUNT
    now: datetime = START
    auditor: Auditor = field(default_factory=Auditor)
    sent: list[tuple[str, str, Row]] = field(default_factory=list)
    script: list[Step] = field(default_factory=list)
    letters: list[tuple[str, str, Row]] = field(default_factory=list)
    """What the last operation was followed by: name, id and content, as on the wire."""

    def __post_init__(self) -> None:
        self.account = Account(self.name)
        self.ledger: PlanLedger = PoolLedger(plain(self.catalog))

    def do(self, name: str, operation: str, content: Row) -> Row:
        """Apply it to both; compare the answers and everything that they are made of."""
        self.sent.append((name, operation, content))
        self.script.append((self.now, name, operation, content))
        known = operation in self.account.known
        written = len(self.account.entries)
        numbered = self.account.operations
        answer = send(self.account, name, operation, content, self.now, self.catalog)
        result = read_answer(answer)
        expected = self.ledger.do(name, operation, content, self.now)
        if expected["code"] == "id_conflict":
            assert result == {**expected, "charged": 0, "uses": []}
        else:
            assert result == expected
        said = json.loads(answer.result)
        assert (said["operation"], said["id"], said["account"]) == (name, operation, self.name)
        self.letters = [(each.name, each.operation, json.loads(encode(each.arguments))) for each in answer.follow]
        for (kind, _, content), (kind_there, _, content_there) in zip(self.letters, self.ledger.letters, strict=True):
            assert kind == kind_there
            assert meaning(kind, content) == bare(content_there)
        assert [id for _, id, _ in self.letters] == [id for _, id, _ in self.ledger.letters]
        assert answer.conflict is (expected["code"] == "id_conflict")
        new = self.account.entries[written:]
        if known:
            assert answer.row is None
            assert self.account.operations == numbered
            assert new == [], "time stands still for what was answered before"
        else:
            self.check_row(answer, result, new)
            assert self.account.operations == numbered + 1
            self.check_nothing_expired_is_left()
        self.check_due()
        self.check_live(new)
        self.check_same()
        self.check_purchases()
        self.auditor.check(self.account)
        return result

    def check_row(self, answer: Answer, result: Row, new: list[Entry]) -> None:
        """The operation's row names its own entries and no others; a refusal has none."""
        row = answer.row
        assert row is not None
        own = [entry for entry in new if entry.operation is not None]
        assert new[len(new) - len(own) :] == own, "settling comes first"
        assert {entry.operation for entry in own} <= {row.operation}
        assert row.number == self.account.operations
        assert (row.status, row.code, row.charged_micro) == (
            result["status"],
            result["code"],
            result["charged"],
        )
        assert row.entries == len(own)
        assert row.first_seq == (own[0].seq if own else None)
        assert row.applied_at == self.now
        if row.status == "rejected":
            assert own == []
        check_settling(new[: len(new) - len(own)])

    def check_nothing_expired_is_left(self) -> None:
        for grant in self.account.grants.values():
            assert grant.expires_at is None or grant.expires_at > self.now or not grant.available
        for hold in self.account.holds.values():
            assert hold.status != "open" or hold.expires_at > self.now

    def check_due(self) -> None:
        """When time next changes something is never noted too late; too early costs but a look."""
        due = self.ledger.due()
        assert self.account.due_at() == due
        if due is not None:
            assert self.account.next_due_at is not None
            assert self.account.next_due_at <= due

    def check_live(self, new: list[Entry]) -> None:
        """Nothing was taken from a grant before its start or from its end on."""
        for entry in new:
            if entry.kind in ("consumed", "held", "transferred"):
                grant = self.account.grants[entry.grant]
                assert grant.effective_at <= self.now or self.account.kind == "lead"
                assert grant.expires_at is None or self.now < grant.expires_at

    def check_purchases(self) -> None:
        """What is to be away of a purchase is away, or there is no more to take; what it owes, it pays itself."""
        for name, purchase in self.account.purchases.items():
            lots = [lot for lot in self.account.grants.values() if lot.purchase == name]
            given = sum(lot.granted + lot.received for lot in lots if lot.origin is None)
            away = sum(lot.clawed_back for lot in lots)
            share = Fraction(min(purchase.returned_minor, purchase.paid_minor), purchase.paid_minor or 1)
            lapsed = sum(lot.expired for lot in lots)
            assert int(given * share) <= away or given <= lapsed + away, name
            if any(taking.kind == "owed" for taking in purchase.takings):
                assert not (purchase.is_frozen and any(lot.available for lot in lots)), name

    def check_same(self) -> None:
        """Every grant, every hold, the debt and every entry are the same in both."""
        assert (self.account.status != UNOPENED) is self.ledger.opened
        assert (self.account.status == CLOSED) is self.ledger.closed
        assert (self.account.status == FROZEN) is self.ledger.halted
        assert self.account.converted_to == self.ledger.became
        assert self.account.debt == self.ledger.debt
        assert achieved_at(self.account.achieved) == self.ledger.achieved
        assert self.account.last_grant == len(self.ledger.lots) == len(self.account.grants)
        for lot in self.ledger.lots:
            grant = self.account.grants[lot["number"]]
            for bucket in (*BUCKETS, "clawed_back", "forgiven", "origin"):
                assert getattr(grant, bucket) == lot[bucket], (lot["number"], bucket)
            assert (grant.source, grant.priority, grant.features, grant.operation, grant.purchase) == (
                lot["source"],
                lot["priority"],
                lot["scope"],
                lot["operation"],
                lot["purchase"],
            )
            price = lot["price"] or {"minor": None, "currency": None, "per": None}
            assert (grant.price_minor, grant.price_currency, grant.price_per) == (
                price["minor"],
                price["currency"],
                price["per"],
            )
            assert (grant.effective_at, grant.expires_at, grant.created_at) == (
                lot["start"],
                lot["end"],
                lot["born"],
            )
        assert set(self.account.holds) == set(self.ledger.holds)
        for number, hold in self.ledger.holds.items():
            seen = self.account.holds[number]
            assert (seen.status == "open", seen.amount, seen.expires_at) == (
                hold["open"],
                hold["amount"],
                hold["end"],
            )
        assert len(self.account.entries) == len(self.ledger.movements)
        for entry, movement in zip(
            self.account.entries[self.auditor.read :],
            self.ledger.movements[self.auditor.read :],
            strict=True,
        ):
            assert (entry.operation, entry.kind, entry.grant, entry.amount_micro) == (
                movement["operation"],
                movement["kind"],
                movement["lot"],
                movement["amount"],
            )
            assert (entry.at, entry.recorded_at) == (movement["at"], movement["recorded_at"])
            assert entry.balance_after_micro == movement["balance_after"]
            assert entry.refers_to == movement["refers_to"]


def bare(content: Row) -> Row:
    """A letter of the second ledger without what is not there."""
    return {
        name: [bare(each) if isinstance(each, dict) else each for each in value] if isinstance(value, list) else value
        for name, value in content.items()
        if value is not None
    }


def check_settling(entries: list[Entry]) -> None:
    """Time alone gives back what was held, takes what is owed of it, and lets credits lapse."""
    for entry in entries:
        assert entry.operation is None
        assert entry.kind in (
            "released", "expired", "debt_paid", "revoked", "granted", "rolled_out", "rolled_in", "debt_incurred",
        )  # fmt: skip


def send(account: Account, name: str, operation: str, content: Row, now: datetime, catalog: Catalog) -> Answer:
    """Through the door and into the rules."""
    arguments = json.dumps(content).encode()
    return apply(account, name, operation, decode_message(name, arguments), arguments, now, catalog)


def fails(catalog: Catalog, script: list[Step], kind: type[Both] = Both) -> str | None:
    """How a run fails, if it does."""
    both = kind(catalog)
    for now, name, operation, content in script:
        both.now = now
        try:
            both.do(name, operation, content)
        except Exception as error:  # whatever it is
            return f"{type(error).__name__}: {error}"
    return None


def reduced(catalog: Catalog, script: list[Step], kind: type[Both] = Both) -> str:
    """A failing run without the operations that it fails without, to be read; says how it fails."""
    wanted = list(script)
    shorter = True
    while shorter:
        shorter = False
        for place in reversed(range(len(wanted))):
            fewer = wanted[:place] + wanted[place + 1 :]
            if fails(catalog, fewer, kind) is not None:
                wanted, shorter = fewer, True
    lines = [
        f"  {now:%Y-%m-%d %H:%M:%S.%f}  {operation}  {name}  {content}" for now, name, operation, content in wanted
    ]
    return "\n".join([f"with {catalog.clawback.on_spent}:", *lines, str(fails(catalog, wanted, kind))])


# What is sent. Times are on a grid of ten seconds, so that several things fall due at the same instant.

amounts = st.sampled_from(["0.000001", "0.5", "1", 2, "3", "4.25", "6", 10, "25"])
features = st.sampled_from(["image", "block", "third", "export", "image", "block", "unheard_of"])
quantities = st.sampled_from([None, "0.000001", 1, "2", "7.5", 12, "40"])
sources = st.sampled_from(["pack", "bonus", "signup", "other"])
scopes = st.sampled_from([None, None, None, ["image"], ["block", "third"], ["image", "block"]])
offsets = st.sampled_from([10, 20, 20, 30, 60, 3600, 86_400, 864_000])
jumps = st.sampled_from([0.000001, 1, 10, 10, 10, 20, 60, 3600, 86_400, 3 * 86_400])


def written(instant: datetime) -> str:
    return instant.isoformat().replace("+00:00", "Z")


def present(**content: Any) -> Row:
    """A message with the arguments that are not left out."""
    return {"account": ACCOUNT, **{name: value for name, value in content.items() if value is not None}}


@st.composite
def grants(draw: st.DrawFn, now: datetime) -> Row:
    """A grant with or without priority, scope, a start to come (or past), an end, a purchase."""
    content: Row = {
        "amount": draw(amounts),
        "source": draw(sources),
        "priority": draw(st.sampled_from([None, None, 0, 50, 50, 100])),
        "features": draw(scopes),
        "purchase": draw(st.sampled_from([None, "purchase-1", "purchase-1", "purchase-2"])),
    }
    start = draw(st.sampled_from([None, None, None, -20, 0, 10, 20, 3600]))
    if start is not None:
        content["effective_at"] = written(now + timedelta(seconds=start))
    end = draw(st.sampled_from(["never", "at", "at", "in", "in", "past"]))
    if end == "at":
        content["expires_at"] = written(now + timedelta(seconds=draw(offsets)))
    elif end == "in":
        content["expires_in"] = draw(offsets)
    elif end == "past":
        content["expires_at"] = written(now - timedelta(seconds=draw(st.sampled_from([0, 10]))))
    if draw(st.booleans()):
        content["unit_price"] = draw(st.sampled_from([*PRICES]))
    return present(**content)


PRICES = ({"minor": 499, "currency": "EUR", "per": "25"}, {"minor": 1, "currency": "JPY", "per": "0.5"})


@st.composite
def charges(draw: st.DrawFn, now: datetime) -> Row:
    """A feature with a quantity, or an amount."""
    if draw(st.booleans()):
        return present(amount=draw(amounts), member=draw(st.sampled_from([None, "anna"])))
    return present(feature=draw(features), quantity=draw(quantities))


@st.composite
def holdings(draw: st.DrawFn, now: datetime) -> Row:
    content: Row = draw(charges(now))
    ttl = draw(st.sampled_from([None, None, 1, 10, 20, 3600, 100_000]))
    return content if ttl is None else {**content, "ttl": ttl}


@st.composite
def captures(draw: st.DrawFn, holds: list[str]) -> Row:
    how = draw(st.sampled_from(["all", "amount", "amount", "amount", "quantity"]))
    hold = draw(st.sampled_from(holds))
    if how == "amount":
        return present(hold=hold, amount=draw(st.sampled_from(["0", "0.25", "0.5", "1", 2, "3", "6.5", 30])))
    if how == "quantity":
        return present(hold=hold, quantity=draw(st.sampled_from(["0", 1, "3", 12, "40"])))
    return present(hold=hold)


some = st.sampled_from([None, None, "0.000001", "0.25", "1", 2, "5"])
shares = st.sampled_from([0, 0, 1, 25, 50, 99, 100, 150])
"""What is away of a hundred that was paid."""


def returned(
    purchase: str, share: int, step: int, frozen: bool | None = None, paid: int = 100, currency: str | None = None
) -> Row:
    """A purchase of which so much is away."""
    return present(
        purchase=purchase, paid_minor=paid, returned_minor=share, step=step, frozen=frozen, currency=currency
    )


class Operations(RuleBasedStateMachine):
    """Random operations on one account; after every one both ledgers must agree on everything."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Both(CATALOGS["debt"])

    @initialize(
        catalog=st.sampled_from([*CATALOGS.values(), ACHIEVED]),
        kind=st.sampled_from([None, None, None, None, "user", "lead", "pool", "not yet"]),
        left=st.sampled_from([None] * 9 + [30]),
    )
    def begin(self, catalog: Catalog, kind: str | None, left: int | None) -> None:
        self.both = Both(catalog)
        if kind != "not yet":
            self.send("credits.open", present(kind=kind))
        if left is not None:
            for amount in [10**12] * 8 + [10**12 - left]:
                self.send("credits.grant", present(amount=amount, source="other", expires_in=1))
            self.both.now += timedelta(seconds=1)

    def send(self, name: str, content: Row) -> None:
        self.do(name, f"operation-{len(self.both.sent)}", content)

    def do(self, name: str, operation: str, content: Row) -> None:
        try:
            self.both.do(name, operation, content)
        except Exception as error:
            raise AssertionError(reduced(self.both.catalog, self.both.script)) from error

    def past(self, *names: str) -> list[str]:
        return [operation for name, operation, _ in self.both.sent if name in names]

    def holds(self) -> list[str]:
        """Mostly those that are open; some that are closed or were refused, and one that never was."""
        still_open = [hold.id for hold in self.both.account.holds.values() if hold.status == "open"]
        return [*still_open * 3, *self.past("credits.hold")[-2:], "nowhere"]

    @rule(kind=st.sampled_from([None, "lead", "settle", "settle"]))
    def open_again_or_settle(self, kind: str | None) -> None:
        if kind == "settle":
            self.send("credits.settle", present())
        else:
            self.send("credits.open", present(kind=kind))

    @rule(seconds=jumps)
    def time_passes(self, seconds: float) -> None:
        self.both.now += timedelta(seconds=seconds)

    @rule(data=st.data())
    def time_passes_until_something_ends_or_starts(self, data: st.DataObject) -> None:
        ends = {grant.expires_at for grant in self.both.account.order}
        ends |= {grant.effective_at for grant in self.both.account.order}
        ends |= {hold.expires_at for hold in self.both.account.holds.values() if hold.status == "open"}
        due = sorted(end for end in ends if end is not None and end > self.both.now)
        if due:
            self.both.now = data.draw(st.sampled_from(due))

    @rule(data=st.data())
    def another_grant(self, data: st.DataObject) -> None:
        self.send("credits.grant", data.draw(grants(self.both.now)))

    @rule(data=st.data())
    def grant(self, data: st.DataObject) -> None:
        self.send("credits.grant", data.draw(grants(self.both.now)))

    @rule(data=st.data(), partial=st.sampled_from([None, False, True]))
    def consume(self, data: st.DataObject, partial: bool | None) -> None:
        content = data.draw(charges(self.both.now))
        self.send("credits.consume", content if partial is None else {**content, "partial": partial})

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        self.send("credits.hold", data.draw(holdings(self.both.now)))

    @rule(data=st.data())
    def another_hold(self, data: st.DataObject) -> None:
        self.send("credits.hold", data.draw(holdings(self.both.now)))

    @precondition(lambda self: self.past("credits.hold"))
    @rule(data=st.data())
    def another_capture(self, data: st.DataObject) -> None:
        self.send("credits.capture", data.draw(captures(self.holds())))

    @precondition(lambda self: self.past("credits.hold"))
    @rule(data=st.data())
    def capture(self, data: st.DataObject) -> None:
        self.send("credits.capture", data.draw(captures(self.holds())))

    @precondition(lambda self: self.past("credits.hold"))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.send("credits.release", present(hold=data.draw(st.sampled_from(self.holds()))))

    @precondition(lambda self: self.past("credits.consume", "credits.capture"))
    @rule(data=st.data(), amount=some)
    def refund(self, data: st.DataObject, amount: str | int | None) -> None:
        charged = [operation for operation, known in self.both.account.known.items() if known.lines]
        charged = [*charged[-4:] * 3, *self.past("credits.consume", "credits.capture", "credits.hold")[-2:]]
        self.send("credits.refund", present(operation=data.draw(st.sampled_from(charged)), amount=amount))

    @rule(amount=st.sampled_from(["0.5", "-0.5", "1", -1, "-3", 5, "-25"]))
    def adjust(self, amount: str | int) -> None:
        self.send("credits.adjust", present(amount=amount, actor="admin", reason="goodwill"))

    @rule(data=st.data(), amount=some)
    def revoke_a_grant(self, data: st.DataObject, amount: str | int | None) -> None:
        number = data.draw(st.integers(1, self.both.account.last_grant + 1))
        self.send("credits.revoke", present(grant=number, amount=amount))

    @rule(data=st.data(), amount=some)
    def revoke_a_purchase(self, data: st.DataObject, amount: str | int | None) -> None:
        bought = sorted({grant.purchase for grant in self.both.account.order if grant.purchase is not None})
        purchase = data.draw(st.sampled_from([*bought * 3, "purchase-3"]))
        self.send("credits.revoke", present(purchase=purchase, amount=amount))

    @rule(
        purchase=st.sampled_from(["purchase-1", "purchase-1", "purchase-2", "purchase-3"]),
        share=shares,
        frozen=st.sampled_from([None, None, False, True]),
        behind=st.sampled_from([0, 0, 0, 0, 0, 3]),
        paid=st.sampled_from([100, 100, 300, 0]),
    )
    def claw_back(self, purchase: str, share: int, frozen: bool | None, behind: int, paid: int) -> None:
        step = max(1, len(self.both.sent) - behind)
        self.send("credits.claw_back", returned(purchase, share, step, frozen, paid, "EUR" if behind else None))

    @precondition(lambda self: self.both.sent)
    @rule(data=st.data())
    def the_same_again(self, data: st.DataObject) -> None:
        self.do(*data.draw(st.sampled_from(self.both.sent)))

    @precondition(lambda self: self.both.sent)
    @rule(data=st.data())
    def other_content_under_a_used_id(self, data: st.DataObject) -> None:
        _, operation, _ = data.draw(st.sampled_from(self.both.sent))
        name, _, content = data.draw(st.sampled_from(self.both.sent))
        self.do(name, operation, content)

    @invariant()
    def nothing_changes_between_operations(self) -> None:
        self.both.check_same()


Operations.TestCase.settings = STEPS
TestOperations = pytest.mark.timeout(1800 if THOROUGH else 180)(Operations.TestCase)


# Whole sequences, for what holds between two runs of the same.


@st.composite
def sequences(draw: st.DrawFn) -> list[tuple[float, str, Row]]:
    """Seconds to wait, a name and its arguments, some twenty times; references by place in the sequence."""
    steps: list[tuple[float, str, Row]] = [(0, "credits.open", present())]
    now = START
    for place in range(1, draw(st.integers(2, 20))):
        wait = draw(st.sampled_from([0, 0, 10, 10, 20, 60, 86_400]))
        now += timedelta(seconds=wait)
        holds = [f"operation-{at}" for at, step in enumerate(steps) if step[1] == "credits.hold"]
        charged = [
            f"operation-{at}" for at, step in enumerate(steps) if step[1] in ("credits.consume", "credits.capture")
        ]
        kinds = ["grant", "grant", "consume", "consume", "hold", "hold", "revoke", "revoke_grant", "adjust"]
        kinds += ["claw_back", "claw_back"]
        kinds += ["capture", "release"] if holds else []
        kinds += ["refund", "refund"] if charged else []
        kind = draw(st.sampled_from(kinds))
        content: Row
        if kind == "grant":
            content = draw(grants(now))
        elif kind == "consume":
            content = draw(charges(now))
        elif kind == "hold":
            content = draw(holdings(now))
        elif kind == "revoke":
            content = present(purchase=draw(st.sampled_from(["purchase-1", "purchase-2"])), amount=draw(some))
        elif kind == "revoke_grant":
            kind = "revoke"
            content = present(grant=draw(st.integers(1, place)), amount=draw(some))
        elif kind == "adjust":
            amount = draw(st.sampled_from(["1", "-1", "3", "-0.5"]))
            content = present(amount=amount, actor="admin", reason="a test")
        elif kind == "claw_back":
            purchase = draw(st.sampled_from(["purchase-1", "purchase-2"]))
            content = returned(purchase, draw(shares), place, draw(st.sampled_from([None, True])))
        elif kind == "capture":
            content = draw(captures(holds))
        elif kind == "release":
            content = present(hold=draw(st.sampled_from(holds)))
        else:
            content = present(operation=draw(st.sampled_from(charged)), amount=draw(some))
        steps.append((wait, f"credits.{kind}", content))
    return steps


@st.composite
def purchases(draw: st.DrawFn) -> list[tuple[float, str, Row]]:
    """A life in which purchases end, are spent, come back and are revoked; small amounts, so that all of it meets."""
    steps: list[tuple[float, str, Row]] = [(0, "credits.open", present(kind="pool"))]
    holds: list[str] = []
    charged: list[str] = []
    lots = 0
    for place in range(1, draw(st.integers(6, 25))):
        kinds = ["grant", "grant", "grant", "consume", "consume", "consume", "hold", "hold", "hold"]
        kinds += ["revoke", "revoke_grant", "adjust"] if lots else []
        kinds += ["claw_back"] * 5
        kinds += ["release", "release", "capture"] if holds else []
        kinds += ["refund", "refund", "refund", "refund"] if charged else []
        kind = draw(st.sampled_from(kinds))
        credits = draw(st.sampled_from(["0.000001", 1, 1, 2, 3, 5]))
        operation = f"operation-{place}"
        content: Row
        if kind == "grant":
            lots += 1
            content = present(
                amount=credits,
                source=draw(st.sampled_from(["pack", "bonus"])),
                priority=draw(st.sampled_from([None, None, 1])),
                purchase=draw(st.sampled_from([None, "purchase-1", "purchase-1", "purchase-2"])),
                expires_in=draw(st.sampled_from([None, 20, 60, 60, 86_400])),
            )
        elif kind == "consume":
            content = present(amount=credits, partial=True)
            charged.append(operation)
        elif kind == "hold":
            content = present(amount=credits, ttl=draw(st.sampled_from([20, 60, 86_400, 200_000])))
            holds.append(operation)
        elif kind in ("revoke", "revoke_grant"):
            amount = draw(st.sampled_from([None, None, "0.000001", 1, 2, 4]))
            if kind == "revoke":
                content = present(purchase=draw(st.sampled_from(["purchase-1", "purchase-2"])), amount=amount)
            else:
                kind = "revoke"
                content = present(grant=draw(st.integers(1, lots + 2)), amount=amount)
        elif kind == "claw_back":
            purchase = draw(st.sampled_from(["purchase-1", "purchase-1", "purchase-2"]))
            step = draw(st.sampled_from([place, place, place, max(1, place - 2)]))
            content = returned(purchase, draw(shares), step, draw(st.sampled_from([None, None, True])))
        elif kind == "adjust":
            content = present(amount=draw(st.sampled_from([1, -1, "-0.5", -2])), actor="admin", reason="a test")
        elif kind == "refund":
            amount = draw(st.sampled_from([None, None, 1]))
            content = present(operation=draw(st.sampled_from(charged[-4:])), amount=amount)
        else:
            content = present(hold=draw(st.sampled_from(holds[-3:])))
            if kind == "capture":
                content["amount"] = draw(st.sampled_from(["0", 1, 2, 4]))
                charged.append(operation)
        steps.append((draw(st.sampled_from([0, 0, 0, 0, 20, 60, 86_400, 172_800])), f"credits.{kind}", content))
    return steps


@pytest.mark.timeout(1800 if THOROUGH else 180)
@CLAWBACKS
@given(steps=purchases(), on_spent=st.sampled_from(["debt", "forgive"]))
def test_purchases_that_are_spent_given_back_and_revoked_are_the_same_in_both_ledgers(
    steps: list[tuple[float, str, Row]], on_spent: str
) -> None:
    both = Both(CATALOGS[on_spent])
    for place, (wait, name, content) in enumerate(steps):
        both.now += timedelta(seconds=wait)
        try:
            both.do(name, f"operation-{place}", content)
        except Exception as error:
            raise AssertionError(reduced(both.catalog, both.script)) from error


STORIES = st.lists(st.tuples(shares, st.booleans()), min_size=1, max_size=5)
"""The states of a purchase, one after the other: what is away, and whether it is frozen."""


def after(life: list[tuple[float, str, Row]], catalog: Catalog, *further: tuple[str, Row]) -> Account:
    """An account that lived so, and had these operations at the end of it."""
    account = Account(ACCOUNT)
    now = START
    for place, (wait, name, content) in enumerate(life):
        now += timedelta(seconds=wait)
        send(account, name, f"operation-{place}", content, now, catalog)
    for place, (name, content) in enumerate(further):
        send(account, name, f"further-{place}", content, now, catalog)
    return account


def standing(account: Account) -> Row:
    """All that an account has and owes, lot by lot, and what can be used of it."""
    return {
        "lots": {number: (*each, account.grants[number].clawed_back, account.grants[number].forgiven)
                 for number, each in buckets(account).items()},
        "debt": account.debt,
        "usable": account.spendable(START + timedelta(days=10_000)),
        "purchases": {name: (each.step, each.is_frozen, each.taken_micro) for name, each in account.purchases.items()},
    }  # fmt: skip


@pytest.mark.timeout(1800 if THOROUGH else 180)
@CLAWBACKS
@given(life=purchases(), story=STORIES, on_spent=st.sampled_from(["debt", "forgive"]), data=st.data())
def test_claw_backs_in_any_order_and_number_end_as_the_last_one_alone(
    life: list[tuple[float, str, Row]], story: list[tuple[int, bool]], on_spent: str, data: st.DataObject
) -> None:
    """Where nothing else takes place in between, and where no other debt is: what comes back would pay that."""
    catalog = CATALOGS[on_spent]
    calm = [step for step in life if step[1] not in ("credits.revoke", "credits.claw_back")]
    told = [returned("purchase-1", share, step, frozen) for step, (share, frozen) in enumerate(story, 1)]
    heard = data.draw(st.permutations(told * 2)) if data.draw(st.booleans()) else told
    alone = after(calm, catalog, ("credits.claw_back", told[-1]))
    told_all = after(calm, catalog, *(("credits.claw_back", each) for each in heard))
    assert standing(told_all) == standing(alone)


@pytest.mark.timeout(1800 if THOROUGH else 180)
@CLAWBACKS
@given(life=purchases(), story=STORIES, on_spent=st.sampled_from(["debt", "forgive"]))
def test_claw_backs_end_as_the_last_one_alone_whatever_else_is_owed(
    life: list[tuple[float, str, Row]], story: list[tuple[int, bool]], on_spent: str
) -> None:
    """The debt that is left is as much less as the credits are, and what was forgiven likewise.

    Unless more was taken before than there is to take: what was paid for once, and lapsed when it was given back.
    """
    catalog = CATALOGS[on_spent]
    lots = after(life, catalog).grants.values()
    for root in lots:
        lapsed = sum(lot.expired for lot in lots if root.id in (lot.id, lot.origin))
        assume(root.origin is not None or root.clawed_back <= max(root.granted - lapsed, 0))
    steps = [returned("purchase-1", share, 100 + step, frozen) for step, (share, frozen) in enumerate(story)]
    ways = [
        after(life, catalog, *(("credits.claw_back", each) for each in some_steps))
        for some_steps in (steps, steps[-1:])
    ]
    nets = []
    for account in ways:
        lots = account.grants.values()
        nets.append((account.available - account.debt - sum(lot.forgiven for lot in lots),
                     sum(lot.clawed_back for lot in lots)))  # fmt: skip
        assert account.purchases["purchase-1"].is_frozen is story[-1][1]
    assert nets[0] == nets[1]


@pytest.mark.timeout(1800 if THOROUGH else 180)
@CLAWBACKS
@given(
    life=purchases(),
    amount=st.sampled_from(["0.000001", 1, 3, 5]),
    priority=st.sampled_from([None, 1]),
    share=shares,
    frozen=st.booleans(),
)
def test_a_grant_and_the_claw_back_of_its_purchase_come_to_the_same_in_either_order(
    life: list[tuple[float, str, Row]], amount: str | int, priority: int | None, share: int, frozen: bool
) -> None:
    """A lot that was not frozen when it came paid what was owed; so in the end it is not frozen any more."""
    grant = "credits.grant", present(amount=amount, source="pack", priority=priority, purchase="purchase-9")
    refund = "credits.claw_back", returned("purchase-9", share, 1, frozen)
    over = "credits.claw_back", returned("purchase-9", share, 2)
    one, other = after(life, CATALOGS["debt"], grant, refund, over), after(life, CATALOGS["debt"], refund, grant, over)
    first, second = standing(one), standing(other)
    assert first.pop("purchases").keys() == second.pop("purchases").keys()
    assert first == second


def buckets(account: Account) -> dict[int, tuple[int, ...]]:
    return {number: tuple(getattr(grant, bucket) for bucket in BUCKETS) for number, grant in account.grants.items()}


def moves(account: Account) -> list[tuple[Any, ...]]:
    """The entries but for when they were recorded, which a sweep may do earlier."""
    return [(entry[:7], entry.refers_to) for entry in account.entries]


@SEQUENCES
@given(
    steps=sequences(),
    on_spent=st.sampled_from(["debt", "forgive"]),
    sweeps=st.lists(st.tuples(st.integers(1, 20), st.sampled_from([0, 1, 5, 10, 15, 30, 3600])), max_size=20),
)
def test_sweeps_between_operations_change_no_answer_no_entry_and_no_balance(
    steps: list[tuple[float, str, Row]], on_spent: str, sweeps: list[tuple[int, int]]
) -> None:
    catalog = CATALOGS[on_spent]
    idle, swept = Account(ACCOUNT), Account(ACCOUNT)
    now = START
    for place, (wait, name, content) in enumerate(steps):
        before = now
        now += timedelta(seconds=wait)
        for number, after in enumerate(sorted(after for at, after in sweeps if at == place)):
            sweep = min(now, before + timedelta(seconds=after))
            send(swept, "credits.settle", f"sweep-{place}-{number}", present(), sweep, catalog)
        answers = [send(each, name, f"operation-{place}", content, now, catalog).result for each in (idle, swept)]
        assert answers[0] == answers[1]
    assert buckets(idle) == buckets(swept)
    assert moves(idle) == moves(swept)
    assert idle.debt == swept.debt


@SEQUENCES
@given(
    steps=sequences(),
    on_spent=st.sampled_from(["debt", "forgive"]),
    again=st.lists(st.integers(0, 19), max_size=10),
)
def test_whatever_is_delivered_twice_leaves_the_same_entries_and_the_same_hashes(
    steps: list[tuple[float, str, Row]], on_spent: str, again: list[int]
) -> None:
    catalog = CATALOGS[on_spent]
    once, twice = Account(ACCOUNT), Account(ACCOUNT)
    now = START
    first: dict[int, Any] = {}
    for place, (wait, name, content) in enumerate(steps):
        now += timedelta(seconds=wait)
        send(once, name, f"operation-{place}", content, now, catalog)
        first[place] = json.loads(send(twice, name, f"operation-{place}", content, now, catalog).result)
        for earlier in again:
            if earlier <= place:
                _, name_then, content_then = steps[earlier]
                repeated = send(twice, name_then, f"operation-{earlier}", content_then, now, catalog)
                assert repeated.row is None
                assert json.loads(repeated.result) == {**first[earlier], "replayed": True}
    assert once.entries == twice.entries
    assert once.head == twice.head
    assert buckets(once) == buckets(twice)


@SEQUENCES
@given(steps=sequences(), on_spent=st.sampled_from(["debt", "forgive"]))
def test_no_refund_gives_back_more_than_its_charge_took(steps: list[tuple[float, str, Row]], on_spent: str) -> None:
    both = Both(CATALOGS[on_spent])
    taken: dict[str, int] = {}
    for place, (wait, name, content) in enumerate(steps):
        both.now += timedelta(seconds=wait)
        operation = f"operation-{place}"
        result = both.do(name, operation, content)
        if name in ("credits.consume", "credits.capture") and result["status"] == "applied":
            taken[operation] = result["charged"]
        if name == "credits.refund" and result["status"] == "applied":
            taken[content["operation"]] += result["charged"]
            assert taken[content["operation"]] >= 0


@SEQUENCES
@given(steps=sequences())
def test_an_altered_removed_or_swapped_entry_breaks_the_chain_there(
    steps: list[tuple[float, str, Row]],
) -> None:
    account = Account(ACCOUNT)
    now = START
    for place, (wait, name, content) in enumerate(steps):
        now += timedelta(seconds=wait)
        send(account, name, f"operation-{place}", content, now, CATALOGS["debt"])

    def broken_at(entries: list[Entry]) -> int | None:
        head = b""
        for entry in entries:
            head = chained(head, ACCOUNT, entry)
            if head != entry.hash:
                return entry.seq
        return None

    assert broken_at(account.entries) is None
    for at, entry in enumerate(account.entries):
        altered = list(account.entries)
        altered[at] = entry._replace(amount_micro=entry.amount_micro + 1)
        assert broken_at(altered) == entry.seq
        if at + 1 < len(account.entries):
            assert broken_at(altered[:at] + account.entries[at + 1 :]) == entry.seq + 1
            swapped = list(account.entries)
            swapped[at], swapped[at + 1] = swapped[at + 1], swapped[at]
            assert broken_at(swapped) == entry.seq + 1


def test_every_kind_of_entry_is_reached_by_the_sequences_of_this_file() -> None:
    both = Both(CATALOGS["debt"])
    for name, content in (
        ("credits.open", present()),
        ("credits.grant", present(amount=10, source="pack", expires_in=3600, purchase="purchase-1")),
        ("credits.consume", present(amount="3")),
        ("credits.hold", present(amount="8")),
        ("credits.capture", present(hold="operation-3", amount="7")),
        ("credits.refund", present(operation="operation-2", amount="1")),
        ("credits.revoke", present(purchase="purchase-1")),
        ("credits.grant", present(amount=10, source="bonus")),
        ("credits.grant", present(amount=10, source="pack", purchase="purchase-2")),
        ("credits.consume", present(amount="15")),
        ("credits.claw_back", returned("purchase-2", 100, 1)),
        ("credits.claw_back", returned("purchase-2", 0, 2)),
        ("credits.grant", present(amount=1, source="bonus", expires_in=60)),
    ):
        both.do(name, f"operation-{len(both.sent)}", content)
    both.now += timedelta(days=3)
    both.do("credits.settle", "operation-13", present())
    # What moves between accounts is in test_transfers.py, what a plan carries over in test_plans.py.
    between = {"transferred", "sent", "bounced", "received", "rolled_out", "rolled_in", "unexpired"}
    assert {entry.kind for entry in both.account.entries} == set(MOVES) - between


# Achievements, by lives that are about nothing but using and giving back.


lives_of_use = st.lists(
    st.one_of(
        st.tuples(st.just("consume"), st.sampled_from(["0.5", "1", "2", "2.5", "4", "9"])),
        st.tuples(st.just("hold"), st.sampled_from(["1", "3", "6"])),
        st.tuples(st.just("capture"), st.sampled_from([None, "0", "2", "7"])),
        st.tuples(st.just("refund"), st.sampled_from([None, None, "0.5", "1"])),
        st.tuples(st.just("grant"), st.sampled_from(["5", "12"])),
        st.tuples(st.just("wait"), st.sampled_from([60, 3600, 90_000])),
    ),
    min_size=8, max_size=24,
)  # fmt: skip


@SEQUENCES
@given(lives_of_use, st.integers(0, 10**6))
def test_achievements_are_those_of_the_second_ledger(life: list[tuple[str, Any]], seed: int) -> None:
    """Both agree after every step on what was brought; and all that ever came of it is once each."""
    both = Both(ACHIEVED)
    both.do("credits.open", "open", present(kind="pool"))
    both.do("credits.grant", "grant", present(amount=12, source="pack"))
    for place, (what, value) in enumerate(life):
        named = [id for id, known in both.account.known.items() if known.lines]
        holds = [hold.id for hold in both.account.holds.values() if hold.status == "open"]
        content: Row | None = None
        if what == "wait":
            both.now += timedelta(seconds=value)
        elif what == "refund" and named:
            content = present(operation=named[seed % len(named)], amount=value)
        elif what == "capture" and holds:
            content = present(hold=holds[seed % len(holds)], amount=value)
        elif what == "grant":
            content = present(amount=value, source="pack")
        elif what in ("consume", "hold"):
            content = present(amount=value)
        if content is not None:
            both.do(f"credits.{what}", f"step-{place}", content)
    given = [lot for lot in both.account.grants.values() if lot.source == "achievement" and lot.origin is None]
    credits = {"all_of_ten": 4, "first": 1.5}
    brought = [credits[name] for name in achieved_at(both.account.achieved) if name in credits]
    assert sum(lot.granted for lot in given) == sum(brought) * 1_000_000
