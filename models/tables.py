"""The tables of the ledger.

Every ledger table leads its primary key with the account, so it can be partitioned or distributed by it.
Rows of ``operations`` and ``entries`` are written once and never changed: triggers refuse it. The closing
identity stands as a CHECK on grants and accounts, so a row that breaks it cannot be committed.
"""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    CheckConstraint,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Numeric,
    PrimaryKeyConstraint,
    SmallInteger,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

CLOSING_IDENTITY = (
    "granted_micro + received_micro + restored_micro = available_micro + held_micro + in_transit_micro"
    " + consumed_micro + expired_micro + revoked_micro + sent_micro"
)
NOT_NEGATIVE = " AND ".join(
    f"{bucket}_micro >= 0"
    for bucket in (
        "granted", "received", "restored", "available", "held", "in_transit", "consumed", "expired", "revoked", "sent",
    )
)  # fmt: skip


class Base(DeclarativeBase):
    """All tables; amounts are micro-credits, instants have a zone."""

    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it from the class
        str: Text,
        datetime: TIMESTAMP(timezone=True),
        bytes: LargeBinary,
    }


class Buckets:
    """The ten counters of the closing identity; the first three are what came in."""

    granted_micro: Mapped[int] = mapped_column(BigInteger, server_default="0")
    received_micro: Mapped[int] = mapped_column(BigInteger, server_default="0")
    restored_micro: Mapped[int] = mapped_column(BigInteger, server_default="0")
    available_micro: Mapped[int] = mapped_column(BigInteger, server_default="0")
    held_micro: Mapped[int] = mapped_column(BigInteger, server_default="0")
    in_transit_micro: Mapped[int] = mapped_column(BigInteger, server_default="0")
    consumed_micro: Mapped[int] = mapped_column(BigInteger, server_default="0")
    expired_micro: Mapped[int] = mapped_column(BigInteger, server_default="0")
    revoked_micro: Mapped[int] = mapped_column(BigInteger, server_default="0")
    sent_micro: Mapped[int] = mapped_column(BigInteger, server_default="0")


class AccountRow(Buckets, Base):
    """An account: its totals, where its chain stands, and when time changes it next."""

    __tablename__ = "accounts"
    __table_args__ = (
        CheckConstraint(CLOSING_IDENTITY, name="accounts_close"),
        CheckConstraint(f"{NOT_NEGATIVE} AND debt_micro >= 0", name="accounts_not_negative"),
        Index("accounts_due", "next_due_at", "account", postgresql_where=text("next_due_at IS NOT NULL")),
        Index("accounts_in_transit", "account", postgresql_where=text("in_transit_micro > 0")),
        Index("accounts_converted", "account", postgresql_where=text("converted_to IS NOT NULL")),
        {"postgresql_with": {"fillfactor": "70"}},
    )

    account: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    status: Mapped[str]
    """``unopened`` (only mentioned so far), ``open``, ``frozen`` (by an administrator) or ``closed``."""
    email: Mapped[str | None]
    locale: Mapped[str | None]
    timezone: Mapped[str | None]
    opened_at: Mapped[datetime | None]
    updated_at: Mapped[datetime]
    next_due_at: Mapped[datetime | None]
    operations: Mapped[int] = mapped_column(BigInteger)
    """The number of its last operation."""
    seq: Mapped[int] = mapped_column(BigInteger)
    """The seq of its last entry."""
    head: Mapped[bytes]
    """The hash of its last entry."""
    last_grant: Mapped[int] = mapped_column(Integer)
    debt_micro: Mapped[int] = mapped_column(BigInteger, server_default="0")
    reference_micro: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """What was spendable right after credits last came in: thresholds in percent are of it."""
    converted_to: Mapped[str | None]
    """Of a lead that has signed up, the user."""
    achieved: Mapped[str | None]
    """The achievements that it has, each with the number of its operation: ``beginner:3,expert:120``."""


class AllowanceRow(Base):
    """How much of something an account, or a member of a pool, has used in the period under way."""

    __tablename__ = "allowances"
    __table_args__ = (
        CheckConstraint("used_micro >= 0 AND uses >= 0", name="allowances_not_negative"),
        {"postgresql_with": {"fillfactor": "70"}},
    )

    account: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    """``member:NAME`` and others, see ``models/rules/sharing.py``."""
    limit_micro: Mapped[int | None] = mapped_column(BigInteger)
    period: Mapped[str]
    since: Mapped[datetime]
    """When the period began that the counters are of."""
    used_micro: Mapped[int] = mapped_column(BigInteger)
    uses: Mapped[int] = mapped_column(BigInteger)
    is_listed: Mapped[bool | None]
    """Of a member of a pool: true on its list, false taken off, NULL never on it."""


class ReferralRow(Base):
    """Who referred an account, and by which code it refers others."""

    __tablename__ = "referrals"
    __table_args__ = (
        Index("referrals_by_referrer", "referrer", "claimed_at", postgresql_where=text("referrer IS NOT NULL")),
        Index("referrals_settled", "settled_at", postgresql_where=text("settled_at IS NOT NULL")),
        {"postgresql_with": {"fillfactor": "70"}},
    )

    account: Mapped[str] = mapped_column(primary_key=True)
    code: Mapped[str | None]
    referrer: Mapped[str | None]
    claimed_code: Mapped[str | None]
    claimed_at: Mapped[datetime | None]
    settled_at: Mapped[datetime | None]
    """When it got its bonus, and its referrer was told."""
    referees: Mapped[int] = mapped_column(BigInteger)
    """How many it was rewarded for."""


class CodeRow(Base):
    """A gift or referral code. Its row is locked while one redeems it: it decides who was in time."""

    __tablename__ = "codes"
    __table_args__ = (
        CheckConstraint("used >= 0 AND (uses IS NULL OR used <= uses)", name="codes_uses"),
        Index("codes_by_account", "account", "operation", "place"),
        Index(
            "codes_ending", "expires_at", "code", postgresql_where=text("status = 'open' AND expires_at IS NOT NULL")
        ),
        {"postgresql_with": {"fillfactor": "70"}},
    )

    code: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    """``gift`` or ``referral``."""
    account: Mapped[str]
    operation: Mapped[str]
    place: Mapped[int] = mapped_column(Integer)
    amount_micro: Mapped[int] = mapped_column(BigInteger)
    uses: Mapped[int | None] = mapped_column(BigInteger)
    """NULL for without end."""
    expires_at: Mapped[datetime | None]
    status: Mapped[str]
    """``open`` or ``closed``."""
    used: Mapped[int] = mapped_column(BigInteger)
    closed_at: Mapped[datetime | None]
    terms: Mapped[str] = mapped_column(JSON)
    """All that it is, and that never changes."""


class RedemptionRow(Base):
    """One use of a code; immutable. Its key is why no use can be given twice."""

    __tablename__ = "redemptions"
    __table_args__ = (Index("redemptions_by_account", "account", "at"),)

    code: Mapped[str] = mapped_column(primary_key=True)
    slot: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    """Which use it was, from 0."""
    account: Mapped[str]
    operation: Mapped[str]
    amount_micro: Mapped[int] = mapped_column(BigInteger)
    at: Mapped[datetime]


class SubscriptionRow(Base):
    """An account's plan, or its last one."""

    __tablename__ = "subscriptions"
    __table_args__ = (
        CheckConstraint("period_start < period_end AND allotted_micro >= 0", name="subscriptions_period"),
        {"postgresql_with": {"fillfactor": "70"}},
    )

    account: Mapped[str] = mapped_column(primary_key=True)
    plan: Mapped[str]
    status: Mapped[str]
    """``active`` or ``ended``."""
    anchor: Mapped[datetime]
    zone: Mapped[str]
    number: Mapped[int] = mapped_column(Integer)
    """Months from the anchor to the period under way."""
    period_start: Mapped[datetime]
    period_end: Mapped[datetime]
    paid_until: Mapped[datetime | None]
    """NULL for a plan without a price."""
    ended_at: Mapped[datetime | None]
    cancels: Mapped[bool]
    """Whether it ends with the period under way."""
    allotted_micro: Mapped[int] = mapped_column(BigInteger)
    """Credits of the highest plan of this period."""
    payment: Mapped[str | None]
    price_minor: Mapped[int | None] = mapped_column(BigInteger)
    price_currency: Mapped[str | None]
    price_per_micro: Mapped[int | None] = mapped_column(BigInteger)
    lots: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    """The grants that end with the period."""
    renewal_lots: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    """The grants that its last renewal made or took from."""
    terms: Mapped[str] = mapped_column(JSON)
    """The plan as it is until the next renewal."""
    pending: Mapped[str | None] = mapped_column(JSON)
    """The plan from the next renewal on, where that is another."""
    renewal: Mapped[str | None] = mapped_column(JSON)
    """What the last renewal did."""
    pending_at: Mapped[datetime | None]
    """When that other plan begins, at the earliest."""


class PurchaseRow(Base):
    """A purchase that was ever returned or disputed, as far as its story is told."""

    __tablename__ = "purchases"
    __table_args__ = (
        CheckConstraint(
            "step >= 1 AND paid_minor >= 0 AND returned_minor >= 0 AND taken_micro >= 0", name="purchases_not_negative"
        ),
        {"postgresql_with": {"fillfactor": "70"}},
    )

    account: Mapped[str] = mapped_column(primary_key=True)
    purchase: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger)
    """What comes with a lower one, or the same, is old."""
    paid_minor: Mapped[int] = mapped_column(BigInteger)
    returned_minor: Mapped[int] = mapped_column(BigInteger)
    """What of it is away from the seller."""
    currency: Mapped[str | None]
    is_frozen: Mapped[bool]
    """Whether its credits cannot be used."""
    taken_micro: Mapped[int] = mapped_column(BigInteger)
    """What was taken because of it and not given back, debts and what was forgiven included."""
    lots: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    """The grants that are named in ``takings``."""
    takings: Mapped[str] = mapped_column(JSON)
    """What was taken, in the order of taking: root, grant, kind and micro-credits of each part."""


class NoticeRow(Base):
    """Something that an account is told of: its row is the in-app inbox."""

    __tablename__ = "notices"
    __table_args__ = (
        Index("notices_by_time", "account", "created_at"),
        Index("notices_undelivered", "created_at", "account", "key", postgresql_where=text("delivered_at IS NULL")),
        Index("notices_delivered", "delivered_at", "account", "key", postgresql_where=text("delivered_at IS NOT NULL")),
        Index("notices_unread", "account", "created_at", postgresql_where=text("read_at IS NULL")),
    )

    account: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    """What makes it one, however often what it tells of is looked at."""
    kind: Mapped[str]
    at: Mapped[datetime]
    """The instant of what it tells of."""
    created_at: Mapped[datetime]
    details: Mapped[str] = mapped_column(JSON)
    channels: Mapped[list[str]] = mapped_column(ARRAY(Text))
    """How it goes out, beside the inbox."""
    read_at: Mapped[datetime | None]
    delivered_at: Mapped[datetime | None]
    """When all channels were done with it."""


class DeliveryRow(Base):
    """A notice's way out by one channel."""

    __tablename__ = "deliveries"
    __table_args__ = (
        Index("deliveries_due", "next_attempt_at", postgresql_where=text("next_attempt_at IS NOT NULL")),
        Index("deliveries_parked", "account", "key", "channel", postgresql_where=text("status = 'parked'")),
        {"postgresql_with": {"fillfactor": "70"}},
    )

    account: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    channel: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    """``pending``, ``sent``, ``skipped`` (there is no address) or ``parked`` (given up, until an operator asks)."""
    attempts: Mapped[int] = mapped_column(Integer)
    """How many have failed."""
    next_attempt_at: Mapped[datetime | None]
    """When its message is sent again at the latest; NULL when it is done."""
    sent_at: Mapped[datetime | None]
    error: Mapped[str | None]


class GrantRow(Buckets, Base):
    """One lot of credits of an account."""

    __tablename__ = "grants"
    __table_args__ = (
        ForeignKeyConstraint(["account"], ["accounts.account"], name="grants_account"),
        CheckConstraint(CLOSING_IDENTITY, name="grants_close"),
        CheckConstraint(
            f"{NOT_NEGATIVE} AND clawed_back_micro >= 0 AND forgiven_micro >= 0", name="grants_not_negative"
        ),
        CheckConstraint(
            "is_open = (available_micro > 0 OR held_micro > 0 OR in_transit_micro > 0)", name="grants_open"
        ),
        Index("grants_open_by_account", "account", postgresql_where=text("is_open")),
        Index("grants_by_origin", "account", "origin", postgresql_where=text("origin IS NOT NULL")),
        Index("grants_by_purchase", "account", "purchase", postgresql_where=text("purchase IS NOT NULL")),
        Index(
            "grants_expiring",
            "expires_at",
            "account",
            "grant_id",
            postgresql_where=text("is_open AND expires_at IS NOT NULL"),
        ),
        Index(
            "grants_by_time",
            "created_at",
            postgresql_using="brin",
            postgresql_with={"pages_per_range": 16, "autosummarize": "on"},
        ),
        {"postgresql_with": {"fillfactor": "70"}},
    )

    account: Mapped[str] = mapped_column(primary_key=True)
    grant_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    """The account's own count of its grants, from 1."""
    source: Mapped[str]
    priority: Mapped[int] = mapped_column(SmallInteger)
    features: Mapped[list[str] | None] = mapped_column(ARRAY(Text))
    effective_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    operation: Mapped[str]
    purchase: Mapped[str | None]
    price_minor: Mapped[int | None] = mapped_column(BigInteger)
    """Money paid, in minor units of ``price_currency``, for every ``price_per_micro`` credits."""
    price_currency: Mapped[str | None]
    price_per_micro: Mapped[int | None] = mapped_column(BigInteger)
    clawed_back_micro: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """What revocations took back of it, were it spent or not."""
    forgiven_micro: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """What revocations let go because it was spent or set aside."""
    origin: Mapped[int | None] = mapped_column(Integer)
    """The grant that this one continues, because that had expired when its credits came back."""
    is_open: Mapped[bool]


class OperationRow(Base):
    """One message and its first answer; immutable. Columns of a fixed width come first: rows have no padding."""

    __tablename__ = "operations"
    __table_args__ = (
        PrimaryKeyConstraint("account", "operation"),
        UniqueConstraint("account", "number", name="operations_in_order"),
        Index(
            "operations_by_time",
            "applied_at",
            postgresql_using="brin",
            postgresql_with={"pages_per_range": 16, "autosummarize": "on"},
        ),
        Index("operations_refunds", "applied_at", postgresql_where=text("name = 'credits.refund'")),
    )

    number: Mapped[int] = mapped_column(BigInteger)
    """Its place among the account's operations, from 1, without gaps."""
    charged_micro: Mapped[int] = mapped_column(BigInteger)
    applied_at: Mapped[datetime]
    quantity_micro: Mapped[int | None] = mapped_column(BigInteger)
    first_seq: Mapped[int | None] = mapped_column(BigInteger)
    occurred_at: Mapped[datetime | None]
    entries: Mapped[int] = mapped_column(Integer)
    """How many entries it wrote, from ``first_seq`` on."""
    account: Mapped[str]
    operation: Mapped[str]
    """The operation id, chosen by the producer: the idempotency key."""
    name: Mapped[str]
    status: Mapped[str]
    code: Mapped[str | None]
    feature: Mapped[str | None]
    member: Mapped[str | None]
    catalog: Mapped[str]
    arguments: Mapped[str] = mapped_column(JSON)
    result: Mapped[str] = mapped_column(JSON)
    """The answer without operation, id, status and account, which are columns."""


class EntryRow(Base):
    """So many credits in or out of one grant; immutable, chained by hash. Columns of a fixed width come first here."""

    __tablename__ = "entries"
    __table_args__ = (
        PrimaryKeyConstraint("account", "seq"),
        Index(
            "entries_by_time",
            "recorded_at",
            postgresql_using="brin",
            postgresql_with={"pages_per_range": 16, "autosummarize": "on"},
        ),
    )

    seq: Mapped[int] = mapped_column(BigInteger, autoincrement=False)
    amount_micro: Mapped[int] = mapped_column(BigInteger)
    balance_after_micro: Mapped[int] = mapped_column(BigInteger)
    at: Mapped[datetime]
    recorded_at: Mapped[datetime]
    grant_id: Mapped[int] = mapped_column(Integer)
    account: Mapped[str]
    operation: Mapped[str | None]
    """The operation that caused it; NULL where time did."""
    kind: Mapped[str]
    refers_to: Mapped[str | None]
    hash: Mapped[bytes]


class HoldRow(Base):
    """Credits set aside; its receipt says out of which grants."""

    __tablename__ = "holds"
    __table_args__ = (
        Index("holds_open_by_account", "account", postgresql_where=text("status = 'open'")),
        {"postgresql_with": {"fillfactor": "80"}},
    )

    account: Mapped[str] = mapped_column(primary_key=True)
    hold: Mapped[str] = mapped_column(primary_key=True)
    """The id of the operation that made it."""
    status: Mapped[str]
    amount_micro: Mapped[int] = mapped_column(BigInteger)
    captured_micro: Mapped[int] = mapped_column(BigInteger)
    feature: Mapped[str | None]
    member: Mapped[str | None]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    closed_at: Mapped[datetime | None]


class ReceiptRow(Base):
    """What a hold or a charge took from one grant, and what went back since.

    A hold has its rows from the start. What a consume or capture took stands in its entries; it gets rows
    here when something is first given back.
    """

    __tablename__ = "receipts"
    __table_args__ = (
        CheckConstraint("returned_micro >= 0 AND returned_micro <= taken_micro", name="receipts_within_taken"),
        {"postgresql_with": {"fillfactor": "80"}},
    )

    account: Mapped[str] = mapped_column(primary_key=True)
    operation: Mapped[str] = mapped_column(primary_key=True)
    line: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    grant_id: Mapped[int] = mapped_column(Integer)
    taken_micro: Mapped[int] = mapped_column(BigInteger)
    returned_micro: Mapped[int] = mapped_column(BigInteger)


class OutboxRow(Base):
    """What follows from an operation: committed with it, published after, deleted when the broker confirmed."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    """In the order of writing; the rows that follow from one account are published in it."""
    account: Mapped[str]
    """Whose lane it goes through. The lane itself is worked out when it is published."""
    exchange: Mapped[str]
    """Empty for an operation, which goes to its lane's queue."""
    task: Mapped[str]
    """The operation's name, or the event's type."""
    operation: Mapped[str]
    """The operation's id, or the event's: the receiver knows it by that."""
    arguments: Mapped[str] = mapped_column(JSON)
    """The operation's arguments, or the event."""
    created_at: Mapped[datetime]


class QuarantineRow(Base):
    """A message that could not be understood or applied, whole, with the reason."""

    __tablename__ = "quarantine"
    __table_args__ = (
        UniqueConstraint("digest", name="quarantine_once"),
        Index("quarantine_open", "id", postgresql_where=text("status = 'open'")),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    digest: Mapped[bytes]
    """SHA-256 over queue, headers and body: a redelivery is the same row."""
    status: Mapped[str]
    """``open``, ``replayed`` or ``dropped``."""
    code: Mapped[str]
    reason: Mapped[str]
    traceback: Mapped[str | None]
    queue: Mapped[str]
    task: Mapped[str | None]
    operation: Mapped[str | None]
    account: Mapped[str | None]
    content_type: Mapped[str | None]
    headers: Mapped[bytes]
    """The message's headers and properties, as JSON, byte for byte as far as they could be read."""
    body: Mapped[bytes]
    times_seen: Mapped[int] = mapped_column(Integer, server_default="1")
    received_at: Mapped[datetime]
    resolved_at: Mapped[datetime | None]
    resolved_by: Mapped[str | None]


class SealRow(Base):
    """A root over where all accounts stood, chained to the seal before; immutable."""

    __tablename__ = "seals"

    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    cutoff: Mapped[datetime]
    """Everything recorded before it is in this seal or in one before."""
    accounts: Mapped[int] = mapped_column(BigInteger)
    """How many accounts had moved since the seal before: as many leaves it has."""
    operations: Mapped[int] = mapped_column(BigInteger)
    entries: Mapped[int] = mapped_column(BigInteger)
    previous: Mapped[bytes]
    root: Mapped[bytes]
    sealed_at: Mapped[datetime]


class SealLeafRow(Base):
    """Where an account stood at a seal, if it had moved since the one before; immutable."""

    __tablename__ = "seal_leaves"
    __table_args__ = (
        Index(
            "seal_leaves_by_seal",
            "seal",
            postgresql_using="brin",
            postgresql_with={"pages_per_range": 16, "autosummarize": "on"},
        ),
    )

    account: Mapped[str] = mapped_column(primary_key=True)
    seal: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    seq: Mapped[int] = mapped_column(BigInteger)
    head: Mapped[bytes]
    operations: Mapped[int] = mapped_column(BigInteger)
    operations_head: Mapped[bytes]
    """A hash over all its operations so far, every column of theirs."""


class AuditRow(Base):
    """An incremental audit that held; immutable."""

    __tablename__ = "audits"

    number: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    cutoff: Mapped[datetime | None]
    """The next one looks at what was recorded from here on; NULL for everything."""
    audited_at: Mapped[datetime]
    accounts: Mapped[int] = mapped_column(BigInteger)
    operations: Mapped[int] = mapped_column(BigInteger)
    entries: Mapped[int] = mapped_column(BigInteger)


class Counted:
    """The ten counters as an audit found them."""

    granted_micro: Mapped[int] = mapped_column(BigInteger)
    received_micro: Mapped[int] = mapped_column(BigInteger)
    restored_micro: Mapped[int] = mapped_column(BigInteger)
    available_micro: Mapped[int] = mapped_column(BigInteger)
    held_micro: Mapped[int] = mapped_column(BigInteger)
    in_transit_micro: Mapped[int] = mapped_column(BigInteger)
    consumed_micro: Mapped[int] = mapped_column(BigInteger)
    expired_micro: Mapped[int] = mapped_column(BigInteger)
    revoked_micro: Mapped[int] = mapped_column(BigInteger)
    sent_micro: Mapped[int] = mapped_column(BigInteger)


class CheckpointRow(Counted, Base):
    """Where an account stood at the last incremental audit that held and saw it."""

    __tablename__ = "checkpoints"
    __table_args__ = ({"postgresql_with": {"fillfactor": "70"}},)

    account: Mapped[str] = mapped_column(primary_key=True)
    operations: Mapped[int] = mapped_column(BigInteger)
    seq: Mapped[int] = mapped_column(BigInteger)
    head: Mapped[bytes]
    debt_micro: Mapped[int] = mapped_column(BigInteger)


class CheckpointGrantRow(Counted, Base):
    """Where a grant stood at the last incremental audit that held and saw it move."""

    __tablename__ = "checkpoint_grants"
    __table_args__ = ({"postgresql_with": {"fillfactor": "70"}},)

    account: Mapped[str] = mapped_column(primary_key=True)
    grant_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)


class ScheduleRow(Base):
    """A schedule of beat's, as the beat that ticks last sent it."""

    __tablename__ = "schedules"

    name: Mapped[str] = mapped_column(primary_key=True)
    task: Mapped[str]
    last_tick_at: Mapped[datetime]
    """By the clock of the beat's machine."""


class UsageDayRow(Base):
    """What one account used of one feature on one day, UTC; made of operations, and can be made of them again."""

    __tablename__ = "usage_days"
    __table_args__ = (
        Index(
            "usage_days_by_day",
            "day",
            postgresql_using="brin",
            postgresql_with={"pages_per_range": 16, "autosummarize": "on"},
        ),
        {"postgresql_with": {"fillfactor": "70"}},
    )

    account: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    """When it occurred, or was applied where the producer did not say."""
    feature: Mapped[str] = mapped_column(primary_key=True)
    """Empty for charges that name none."""
    member: Mapped[str] = mapped_column(primary_key=True)
    """Who used it, of a pool; empty for others."""
    operations: Mapped[int] = mapped_column(BigInteger)
    """Charges: consumes and captures that were applied."""
    quantity_micro: Mapped[Decimal] = mapped_column(Numeric)
    """Units of the feature in millionths; nothing of charges that name an amount."""
    charged_micro: Mapped[Decimal] = mapped_column(Numeric)
    refunded_micro: Mapped[Decimal] = mapped_column(Numeric)
    """What was given back on this day of charges for the feature, of whichever day they were."""


class UsageWatermarkRow(Base):
    """How far usage is counted; one row, or none before the first time."""

    __tablename__ = "usage_watermark"
    __table_args__ = (CheckConstraint("id = 1", name="usage_watermark_one"),)

    id: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    counted_until: Mapped[datetime]
    """Operations that were applied before are counted, all others are not."""


class PaymentEventRow(Base):
    """A payment provider's event, whole, as it came: the inbox (payments: the way of a webhook)."""

    __tablename__ = "payment_events"
    __table_args__ = (
        UniqueConstraint("provider", "livemode", "event_id", name="payment_events_once"),
        Index("payment_events_due", "next_attempt_at", "id", postgresql_where=text("status = 'received'")),
        Index("payment_events_parked", "id", postgresql_where=text("status = 'parked'")),
        {"postgresql_with": {"fillfactor": "90"}},
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    provider: Mapped[str]
    livemode: Mapped[bool]
    event_id: Mapped[str]
    type: Mapped[str]
    source: Mapped[str]
    """``webhook``, ``receive`` (a task of another party's relay) or ``reconcile``."""
    created_at: Mapped[datetime]
    """By the provider's clock."""
    received_at: Mapped[datetime]
    body: Mapped[bytes]
    status: Mapped[str] = mapped_column(server_default="received")
    """``received``, ``done``, ``ignored`` (it says nothing to us), ``parked`` or ``dropped``."""
    code: Mapped[str | None]
    reason: Mapped[str | None]
    attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    """How often reading it failed."""
    next_attempt_at: Mapped[datetime | None]
    """When its message is sent again at the latest; NULL when it never was."""
    done_at: Mapped[datetime | None]
    resolved_by: Mapped[str | None]


class PaymentGroupRow(Base):
    """Facts that belong together: one purchase, or one subscription with all that was paid for it."""

    __tablename__ = "payment_groups"
    __table_args__ = (
        Index("payment_groups_due", "next_look_at", postgresql_where=text("next_look_at IS NOT NULL")),
        {"postgresql_with": {"fillfactor": "70"}},
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    next_look_at: Mapped[datetime | None]
    """When it is looked at again because something of it waits."""


class PaymentFactRow(Base):
    """What a provider says is so, of one object; a later word takes the place of an earlier one."""

    __tablename__ = "payment_facts"
    __table_args__ = (
        Index("payment_facts_by_key", "key"),
        Index("payment_facts_by_group", "group_id"),
        Index("payment_facts_by_purchase", "purchase", postgresql_where=text("purchase IS NOT NULL")),
        Index("payment_facts_unsettled", "heard_at", postgresql_where=text("status IN ('waiting', 'parked')")),
        Index("payment_facts_by_time", "provider", "livemode", "occurred_at"),
        {"postgresql_with": {"fillfactor": "70"}},
    )

    provider: Mapped[str] = mapped_column(primary_key=True)
    livemode: Mapped[bool] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(BigInteger)
    event: Mapped[int] = mapped_column(BigInteger)
    """The inbox row that it was last heard by."""
    purchase: Mapped[str | None]
    """Of what was paid, what the ledger calls it."""
    fact: Mapped[str] = mapped_column(JSON)
    occurred_at: Mapped[datetime]
    heard_at: Mapped[datetime]
    """When it was first heard."""
    status: Mapped[str]
    """``applied``, ``noted`` (nothing follows from it), ``waiting`` or ``parked``."""
    code: Mapped[str | None]
    reason: Mapped[str | None]


class PaymentAliasRow(Base):
    """A provider's id of something, and the facts that it belongs to."""

    __tablename__ = "payment_aliases"
    __table_args__ = (
        Index("payment_aliases_by_id", "id"),
        Index("payment_aliases_by_group", "group_id"),
    )

    provider: Mapped[str] = mapped_column(primary_key=True)
    livemode: Mapped[bool] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(BigInteger)


class PaymentBindingRow(Base):
    """A provider's customer or subscription, and whose it is."""

    __tablename__ = "payment_bindings"
    __table_args__ = (Index("payment_bindings_by_account", "account", "provider", "livemode", "kind"),)

    provider: Mapped[str] = mapped_column(primary_key=True)
    livemode: Mapped[bool] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    """``customer`` or ``subscription``."""
    id: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str]
    bound_at: Mapped[datetime]


class PaymentOperationRow(Base):
    """A ledger operation that facts led to; immutable, but for the group."""

    __tablename__ = "payment_operations"
    __table_args__ = (
        UniqueConstraint("provider", "livemode", "effect", name="payment_operations_once"),
        Index("payment_operations_by_group", "group_id", "number"),
        Index("payment_operations_by_purchase", "account", "purchase"),
        Index("payment_operations_by_time", "created_at"),
    )

    number: Mapped[int] = mapped_column(BigInteger, Identity())
    """In the order of sending."""
    operation: Mapped[str] = mapped_column(primary_key=True)
    """Its id, which nobody can guess: made before it is sent."""
    provider: Mapped[str]
    livemode: Mapped[bool]
    effect: Mapped[str]
    """What makes it one, however often its facts are heard."""
    group_id: Mapped[int] = mapped_column(BigInteger)
    account: Mapped[str]
    name: Mapped[str]
    purchase: Mapped[str | None]
    arguments: Mapped[str] = mapped_column(JSON)
    created_at: Mapped[datetime]


class PaymentOrderRow(Base):
    """A custom quote: asked for, quoted by an administrator, paid."""

    __tablename__ = "payment_orders"
    __table_args__ = (
        CheckConstraint(
            "status IN ('inquiry', 'cancelled')"
            " OR (credits_micro > 0 AND price_minor >= 0 AND currency IS NOT NULL AND actor IS NOT NULL)",
            name="payment_orders_quoted",
        ),
        Index("payment_orders_by_account", "account", "created_at"),
        Index("payment_orders_open", "created_at", postgresql_where=text("status IN ('inquiry', 'quoted')")),
        {"postgresql_with": {"fillfactor": "70"}},
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str]
    status: Mapped[str]
    """``inquiry``, ``quoted``, ``paid`` or ``cancelled``."""
    pack: Mapped[str | None]
    """The pack of the catalog that is sold by quote."""
    asked_micro: Mapped[int | None] = mapped_column(BigInteger)
    credits_micro: Mapped[int | None] = mapped_column(BigInteger)
    price_minor: Mapped[int | None] = mapped_column(BigInteger)
    currency: Mapped[str | None]
    expires_at: Mapped[datetime | None]
    """Until when it can be bought."""
    actor: Mapped[str | None]
    """Who quoted it."""
    note: Mapped[str | None]
    created_at: Mapped[datetime]
    quoted_at: Mapped[datetime | None]
    session_id: Mapped[str | None]
    """The provider's checkout, where one was made."""
    paid_by: Mapped[str | None]
    """The purchase that paid it."""


class PaymentWatermarkRow(Base):
    """How far a provider's objects of one kind were compared with the ledger."""

    __tablename__ = "payment_watermarks"

    provider: Mapped[str] = mapped_column(primary_key=True)
    livemode: Mapped[bool] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    until: Mapped[datetime]


class CatalogRow(Base):
    """The text of a catalog that operations were applied under; immutable."""

    __tablename__ = "catalogs"
    __table_args__ = (CheckConstraint("label ~ '^[a-z0-9_-]{1,64}-[1-9][0-9]*$'", name="catalogs_label"),)

    label: Mapped[str] = mapped_column(primary_key=True)
    """Name and version, as each operation has it."""
    text: Mapped[str]
    first_used_at: Mapped[datetime]
