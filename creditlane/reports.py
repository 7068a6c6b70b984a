"""What is told of credits' past and future: history, usage, forecast, explanation, simulation, and reports over all."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

import msgspec

from creditlane.contract import MAX_BATCH, Balance, Name, Result
from creditlane.inbox import Advice

MAX_SPAN_DAYS = 3660
"""The longest span of days that usage is asked for."""

MAX_FORECAST_DAYS = 366
"""How far ahead a forecast looks at the most."""

FORECAST_DAYS = 90
"""How far ahead it looks unless its caller says otherwise."""

Grouping = Literal["feature", "member", "day", "week", "month"]
"""What usage is told by; days are UTC, weeks begin on Monday."""

Status = Literal["applied", "rejected"]

Merit = Literal["used", "earned"]
"""What accounts are ranked by."""

RefundGrouping = Literal["reason", "feature", "actor"]
"""What refunds are told apart by."""

# --- History -----------------------------------------------------------------------------------------


class EntryLine(msgspec.Struct, kw_only=True, frozen=True):
    """One entry: so many credits in or out of one grant; ``kind`` says which way."""

    seq: int
    kind: str
    amount: str
    change: str
    """What it did to the available credits: the amount with its sign, or 0."""
    balance: str
    """The available credits after it, upcoming ones included."""
    grant: int
    source: str | None
    """The grant's source."""
    at: datetime
    refers_to: str | None


class HistoryLine(msgspec.Struct, kw_only=True, frozen=True):
    """One operation, applied or refused."""

    number: int
    """Its place among the account's operations, from 1."""
    operation: str
    """Its id."""
    name: str
    status: str
    code: str | None
    feature: str | None
    quantity: str | None
    member: str | None
    charged: str
    change: str
    """What it did to the available credits, with its sign; what time did meanwhile is not part of it."""
    balance: str | None
    """The spendable credits after it, as its answer told."""
    applied_at: datetime
    occurred_at: datetime | None
    reason: str | None
    """Why its sender sent it."""
    actor: str | None
    refusal: str | None
    """Why the ledger refused it, where it says more than the code."""
    subject: str | None
    """The hold, charge, grant, purchase or transfer that it is about, the account that it gave to or got from, or the
    source of what it granted."""
    entries: int
    """How many entries it wrote."""
    lines: list[EntryLine] | None = None
    """Its entries, where they were asked for."""
    lapsed: list[EntryLine] = []
    """What time did just before it: expiries, time-outs of holds."""


class HistoryPage(msgspec.Struct, kw_only=True, frozen=True):
    """A page of a history, the newest operation first."""

    lines: list[HistoryLine]
    next_before: int | None
    """What to ask for next with ``before``; None at the beginning of the history."""


# --- What administrators did --------------------------------------------------------------------------


class Action(msgspec.Struct, kw_only=True, frozen=True):
    """One operation that an administrator sent, applied or refused."""

    account: str
    number: int
    """Its place among the account's operations, from 1."""
    operation: str
    """Its id."""
    name: str
    status: str
    code: str | None
    actor: str
    reason: str | None
    charged: str
    """Credits that were taken by it; negative where they were given back."""
    change: str
    """What it did to the available credits, with its sign."""
    applied_at: datetime


class ActionsPage(msgspec.Struct, kw_only=True, frozen=True):
    """A page of what administrators did, the newest first."""

    actions: list[Action]
    since: datetime
    """How far back was looked."""
    next_before: str | None
    """What to ask for next with ``before``; None where there is nothing older in this span."""


# --- Usage -------------------------------------------------------------------------------------------


class UsageSums(msgspec.Struct, kw_only=True, frozen=True):
    """What was used; amounts in credits."""

    charges: int
    """Consumes and captures that were applied."""
    quantity: Decimal | None
    """Units; None over several features, whose units have nothing in common."""
    credits: Decimal
    """What they were charged."""
    refunded: Decimal
    """What was given back in this time, of whichever charges."""
    used: Decimal
    """What they were charged less what was given back."""
    used_before: Decimal | None
    """``used`` of as many days before; None for one day, week or month among others."""
    change_percent: float | None
    """How much more was used than before, to a tenth; None where nothing was."""


class UsageLine(UsageSums, kw_only=True, frozen=True):
    """What was used of one feature, by one member, or in one day, week or month."""

    key: str
    """The feature or the member, empty for charges that name none; or the first day, such as ``2027-01-31``."""


class Utilisation(msgspec.Struct, kw_only=True, frozen=True):
    """How much of the credits that there were was used, by the ledger's time; what is held counts as neither."""

    used: Decimal
    left: Decimal
    """What was there at the end, upcoming credits included."""
    expired: Decimal
    """What ended unused."""
    percent: float | None
    """``used`` of the three together, to a tenth; None where there were no credits."""


class Usage(msgspec.Struct, kw_only=True, frozen=True):
    """What an account, or all of them, used in a span of days."""

    account: str | None
    """None for all."""
    by: Grouping
    since: date
    """The first day."""
    until: date
    """The day after the last."""
    before: date
    """The first of as many days before."""
    as_of: datetime
    total: UsageSums
    utilisation: Utilisation | None
    """None for all accounts, where only one feature or member was asked for, or of too many entries."""
    lines: list[UsageLine]
    """Features and members by what they used, the most first; days, weeks and months in order."""
    next_after: str | None
    """What to ask for next with ``after``; None at the end."""


# --- Pools -------------------------------------------------------------------------------------------


class PoolMember(msgspec.Struct, kw_only=True, frozen=True):
    """A member of a pool: what it may use, and what it did; amounts in credits."""

    member: str
    status: Literal["listed", "removed", "unlisted"]
    """``removed`` uses the pool no more; ``unlisted`` was never on its list, and used it all the same."""
    limit: Decimal | None
    """In a period: its own, or the catalog's for all; None without one."""
    period: Literal["day", "week", "month", "total"] | None
    """None for one that is not counted, as the next three."""
    period_end: datetime | None
    """The first instant after the period under way; None of ``total`` as well."""
    used: Decimal | None
    """In the period under way, what is held included and what was given back not."""
    left: Decimal | None
    """What its limit leaves; the pool may have less."""
    charged: Decimal
    """In the span of days, less what was given back in it."""
    share_percent: float | None
    """Of what the whole pool was charged then, to a tenth; None where that is nothing."""


class Pool(msgspec.Struct, kw_only=True, frozen=True):
    """A pool, and a page of its members by name."""

    account: str
    as_of: datetime
    available: Decimal
    """What can be spent now, by all."""
    held: Decimal
    open_to: Literal["any", "listed"]
    """Who may use it: whoever is named as a member and was not removed, or only those that are listed."""
    since: date
    """The first day of the span, UTC."""
    until: date
    """The day after the last."""
    charged: Decimal
    """By all, less what was given back."""
    own: Decimal
    """Of that, what names no member."""
    members: list[PoolMember]
    next_after: str | None
    """What to ask for next with ``after``; None at the end."""


# --- Forecast ----------------------------------------------------------------------------------------


class Lapse(msgspec.Struct, kw_only=True, frozen=True):
    """Credits that will end unused."""

    at: datetime
    amount: Decimal


class Evening(msgspec.Struct, kw_only=True, frozen=True):
    """What will be left at the end of a day."""

    at: datetime
    available: Decimal


class Forecast(msgspec.Struct, kw_only=True, frozen=True):
    """What will become of an account's credits at its present pace."""

    account: str
    as_of: datetime
    until: datetime
    """How far ahead it looks."""
    pace: Decimal
    """Credits a day that are spent."""
    available: Decimal
    """What can be spent now."""
    depleted_at: datetime | None
    """When that is used up, if nothing came and nothing ended; None where nothing is spent, or it lasts very long."""
    runs_out_at: datetime | None
    """The end of the first day on which the pace cannot be kept, all that will come and end considered; None if that
    is not by ``until``."""
    expiring: list[Lapse]
    expiring_total: Decimal
    daily: list[Evening]
    paid: bool
    """Whether payments for the plan are taken to arrive in time."""
    advice: Advice | None
    """What there is to do; None for an account that is charged nothing."""


# --- Explanation -------------------------------------------------------------------------------------


class Buckets(msgspec.Struct, kw_only=True, frozen=True):
    """Where credits came from and where they are: the first three together are all the others together."""

    granted: Decimal
    received: Decimal
    """From other accounts, and carried over from lots that ended."""
    restored: Decimal
    """Refunds."""
    available: Decimal
    held: Decimal
    in_transit: Decimal
    """On their way to another account."""
    consumed: Decimal
    expired: Decimal
    revoked: Decimal
    """Taken back, and paid for debts."""
    sent: Decimal
    """To other accounts, and carried over into new lots."""


class Lot(Buckets, kw_only=True, frozen=True):
    """One grant: what came in, what it paid, and what is left."""

    grant: int
    source: str
    priority: int
    features: list[str] | None
    """What it may be spent on; None for everything."""
    effective_at: datetime
    expires_at: datetime | None
    created_at: datetime
    operation: str
    """What made it."""
    purchase: str | None
    origin: int | None
    """The grant that it continues, because that had expired when its credits came back."""


class BalanceExplained(msgspec.Struct, kw_only=True, frozen=True, tag_field="explains", tag="balance"):
    """Why a balance is what it is; what time has made due counts as done."""

    account: str
    as_of: datetime
    available: Decimal
    """What can be spent now."""
    upcoming: Decimal
    """What takes effect later."""
    frozen: Decimal
    """Of disputed purchases."""
    debt: Decimal
    total: Buckets
    """Of all grants ever."""
    closed: Buckets
    """Of those that nothing is left of."""
    closed_grants: int
    lots: list[Lot]
    """The others, in the order in which they are spent."""


class Movement(msgspec.Struct, kw_only=True, frozen=True):
    """So many credits in or out of one grant."""

    seq: int
    kind: str
    amount: Decimal
    grant: int
    source: str
    priority: int
    expires_at: datetime | None
    """The grant's."""
    at: datetime
    operation: str | None
    """What caused it; None where time did."""
    name: str | None
    """Its task name."""
    feature: str | None
    member: str | None
    refers_to: str | None
    """The hold, charge, purchase or transfer that it is about."""


class OperationExplained(msgspec.Struct, kw_only=True, frozen=True, tag_field="explains", tag="operation"):
    """Which grants an operation took from or gave to, in its order: for a charge, the order of burning."""

    account: str
    operation: str
    name: str
    status: Status
    code: str | None
    """Why it was refused."""
    applied_at: datetime
    feature: str | None
    member: str | None
    quantity: Decimal | None
    charged: Decimal
    given_back: Decimal
    """What went back since, of a charge or a hold."""
    movements: list[Movement]
    next_after: int | None
    """What to ask for next with ``after``; None at the end."""


class GrantExplained(msgspec.Struct, kw_only=True, frozen=True, tag_field="explains", tag="grant"):
    """The life of a grant: every movement in or out of it, the oldest first; as the ledger has recorded it."""

    account: str
    lot: Lot
    movements: list[Movement]
    next_after: int | None
    """What to ask for next with ``after``; None at the end. A page may have fewer rows than were asked for."""


# --- Simulation --------------------------------------------------------------------------------------


class Planned(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An operation that somebody thinks of sending, or several that are alike."""

    name: str
    """The task name, such as ``credits.consume``."""
    arguments: dict[str, Any] = {}
    """As on the wire, without the account."""
    id: Name | None = None
    """By which later ones name it, such as the capture of a hold; only for one by itself."""
    times: Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH)] = 1

    def __post_init__(self) -> None:
        if self.id is not None and self.times != 1:
            raise ValueError("operations that are alike have no id: an id is applied once")


class Simulation(msgspec.Struct, kw_only=True, frozen=True):
    """What operations would do, one after the other; nothing of it was done."""

    account: str
    as_of: datetime
    at: datetime
    """The instant that they are taken to be applied at."""
    paid: bool
    """Whether payments for a plan are taken to arrive in time until then."""
    before: Balance
    after: Balance
    charged: Decimal
    """What they would use up, less what they give back; what is held is not used yet."""
    refused: int
    """How many would be refused: their results say why, and what pack or plan would do."""
    results: list[Result]
    """The answer to each, in order."""


# --- Leaderboard -------------------------------------------------------------------------------------


class Ranked(msgspec.Struct, kw_only=True, frozen=True):
    """An account and its place."""

    rank: int
    """From 1; who has as much shares it."""
    account: str
    credits: Decimal


class Leaderboard(msgspec.Struct, kw_only=True, frozen=True):
    """The accounts that used or earned the most."""

    by: Merit
    since: date | None
    """The first day; None for all time."""
    until: date | None
    """The day after the last; None for all time."""
    as_of: datetime
    accounts: int
    """How many used or earned anything."""
    total: Decimal
    """What all of them did."""
    lines: list[Ranked]
    """The most first, accounts of one rank in their order."""
    own: Ranked | None
    """The place of the account that was asked for; None where none was, or it has nothing."""
    next_after: str | None
    """What to ask for next with ``after``; None at the end."""


# --- Refunds -----------------------------------------------------------------------------------------


class RefundSums(msgspec.Struct, kw_only=True, frozen=True):
    """What was given back."""

    refunds: int
    credits: Decimal
    charged: Decimal
    """What was charged in the same days, for the same feature where features are told apart."""
    share_percent: float | None
    """``credits`` of that, to a tenth; None where nothing was charged."""


class RefundLine(RefundSums, kw_only=True, frozen=True):
    """What was given back for one reason, of one feature, by one actor; each None where that is not told apart."""

    reason: str | None
    """Empty where none was given."""
    feature: str | None
    """Empty for charges that name none."""
    actor: str | None
    """The administrator; empty for what callers gave back themselves."""


class Refunds(msgspec.Struct, kw_only=True, frozen=True):
    """What was given back in a span of days, UTC, and why."""

    account: str | None
    """None for all."""
    by: list[RefundGrouping]
    since: date
    """The first day."""
    until: date
    """The day after the last."""
    as_of: datetime
    total: RefundSums
    lines: list[RefundLine]
    """The most credits first."""
    next_after: int | None
    """What to ask for next with ``after``; None at the end."""


# --- Referrals ---------------------------------------------------------------------------------------


class Referee(msgspec.Struct, kw_only=True, frozen=True):
    """Somebody whom an account referred."""

    account: str
    claimed_at: datetime
    status: str
    """``waiting`` for its first purchase, ``settled`` when the reward is on its way, ``rewarded``, or the code of the
    refusal, such as ``daily_limit``."""
    settled_at: datetime | None
    """When it got its own bonus."""
    rewarded_at: datetime | None
    """When the reward came, or was refused."""
    reward: str
    """Credits."""


class Referrals(msgspec.Struct, kw_only=True, frozen=True):
    """Who referred an account, and a page of those whom it referred, the latest first."""

    account: str
    code: str | None
    """By which it refers others; None until one was issued."""
    referrer: str | None
    claimed_code: str | None
    """That of its referrer."""
    claimed_at: datetime | None
    settled_at: datetime | None
    """When it got its bonus as a referee."""
    rewarded: int
    """How many it was rewarded for, in all."""
    referees: list[Referee]
    next_before: str | None = None
    """For the page after this one."""


# --- Achievements ------------------------------------------------------------------------------------


class Trophy(msgspec.Struct, kw_only=True, frozen=True):
    """An achievement that an account has reached."""

    achievement: str
    """Its name."""
    title: str
    credits: Decimal
    """What came with it."""
    reached_at: datetime
    operation: str
    """The operation that brought it."""
    grant: int | None
    """The grant that the credits came in; None where none did."""


class Goal(msgspec.Struct, kw_only=True, frozen=True):
    """An achievement that is yet to be reached."""

    achievement: str
    title: str
    measure: str
    """What is counted: ``used`` credits, or ``referrals``."""
    at: Decimal
    """From how many on it is reached."""
    done: Decimal
    """How many there are."""
    percent: float
    """``done`` of ``at``, to a tenth."""
    credits: Decimal
    """What will come with it."""


class Achievements(msgspec.Struct, kw_only=True, frozen=True):
    """What an account has achieved, and what comes next."""

    account: str
    reached: list[Trophy]
    """In the order in which they were."""
    goals: list[Goal]
    """The nearest first."""
