"""The message contract, version 1: one type per operation, one result type.

An operation is a Celery task: its name is the operation, its keyword arguments are the content, its
task id is the operation id and so the idempotency key. Everything here is checked at the door, by
producers before sending and by workers on arrival, with the same types.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Literal, TypeGuard

import msgspec

from creditlane.amounts import MAX_MICRO, MICRO, Micro, parse_amount
from creditlane.codes import Code

VERSION = 1
"""The contract's version; every message carries it as ``v``."""

MAX_NAME = 128
"""Characters in an account, an operation id, a feature, a source or a purchase."""

MAX_TEXT = 500
"""Characters in a reason or an actor."""

MAX_METADATA_BYTES = 4096
"""Bytes of a consume's or hold's metadata, as JSON."""

MAX_MESSAGE_BYTES = 1 << 20
"""Bytes of one message body."""

MAX_BATCH = 1000
"""Operations in one ``credits.batch``."""

MAX_FEATURES = 64
"""Features that one grant may be scoped to."""

MAX_LOTS = 1000
"""Lots that one transfer may be made of: as many as an account may have. The message of so many, however long their
sources, stays under :data:`MAX_MESSAGE_BYTES`."""

MAX_METADATA_DEPTH = 16
"""Levels of objects and arrays in a metadata object."""

FIRST_INSTANT = datetime(1970, 1, 1, tzinfo=UTC)
LAST_INSTANT = datetime(9000, 1, 1, tzinfo=UTC)
"""Between these every instant of a message lies, so that adding any lifetime to it stays in the calendar."""

MAX_OFFSET = timedelta(hours=15)
"""The largest offset from UTC that an instant may be written with; the database takes little more."""

MAX_TTL_SECONDS = 30 * 24 * 3600
"""The longest a hold may live."""

DEFAULT_TTL_SECONDS = 15 * 60
"""How long a hold lives unless its message says otherwise."""

_CLEAN = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*\Z"

_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
"""A NUL as JSON writes it; an escaped backslash before ``u0000`` makes it something else."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME, pattern=_CLEAN)]
Key = Annotated[str, msgspec.Meta(max_length=MAX_NAME, pattern=_CLEAN)]
"""A name, or nothing where none was given."""
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TEXT, pattern=_CLEAN)]
Instant = Annotated[datetime, msgspec.Meta(tz=True)]
GiftCode = Annotated[str, msgspec.Meta(min_length=4, max_length=64, pattern=r"^[A-Z0-9]+\Z")]
"""The text of a gift or referral code as :func:`normal_code` gives it."""

MAX_CODES = 1000
"""Codes that one ``codes.issue`` may make."""

MAX_USES = 1_000_000
"""How often one code may be redeemed."""

Lifetime = Annotated[int, msgspec.Meta(ge=1, le=100 * 366 * 24 * 3600)]
"""Seconds."""


class UnitPrice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Money paid for credits: ``minor`` units of ``currency`` for every ``per`` credits, exactly.

    A pack of 25 credits for 4.99 EUR is ``{"minor": 499, "currency": "EUR", "per": "25"}``.
    """

    minor: Annotated[int, msgspec.Meta(ge=0, le=10**15)]
    currency: Annotated[str, msgspec.Meta(pattern=r"^[A-Z]{3}\Z")]
    per: Micro = Micro(MICRO)

    def __post_init__(self) -> None:
        _positive(self.per, "per")


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, gc=False):
    """What every operation carries: whose account, and the contract's version."""

    operation: ClassVar[str]

    account: Name
    v: Literal[1] = 1


class Open(Message):
    """``credits.open``: create an account, with the catalog's sign-up grant."""

    operation: ClassVar[str] = "credits.open"

    kind: Literal["user", "lead", "pool"] = "user"
    plan: Name | None = None
    """A plan to subscribe to at once."""
    email: Annotated[str, msgspec.Meta(max_length=254, pattern=_CLEAN)] | None = None
    locale: Annotated[str, msgspec.Meta(max_length=35, pattern=r"^[A-Za-z0-9_-]+\Z")] | None = None
    timezone: Annotated[str, msgspec.Meta(max_length=64, pattern=r"^[A-Za-z0-9_+/-]+\Z")] | None = None
    welcome: bool = True
    """Whether it gets the catalog's sign-up credits; an account that is brought along from elsewhere had its own."""
    occurred_at: Instant | None = None
    """Since when it is somebody's, where that was before; kept on the operation's row."""
    referral_code: GiftCode | None = None
    """The code of who referred it; a bad one is told of in the answer, and the account opened all the same."""
    lead: Name | None = None
    """The lead that it was before: what that one has left follows."""

    def __post_init__(self) -> None:
        _in_calendar(self.occurred_at, "occurred_at")
        if self.lead is not None and (self.kind != "user" or self.lead == self.account):
            raise ValueError("lead names another account, and what it becomes is a user")


class Grant(Message):
    """``credits.grant``: add a lot of credits with its own source, priority, scope, start and expiry."""

    operation: ClassVar[str] = "credits.grant"

    amount: Micro
    source: Name
    priority: Annotated[int, msgspec.Meta(ge=0, le=1000)] | None = None
    features: Annotated[list[Name], msgspec.Meta(min_length=1, max_length=MAX_FEATURES)] | None = None
    effective_at: Instant | None = None
    expires_at: Instant | None = None
    expires_in: Annotated[int, msgspec.Meta(ge=1, le=100 * 366 * 24 * 3600)] | None = None
    """Seconds from the moment it takes effect."""
    unit_price: UnitPrice | None = None
    purchase: Name | None = None
    reason: Text | None = None

    def __post_init__(self) -> None:
        _positive(self.amount, "amount")
        _in_calendar(self.effective_at, "effective_at")
        _in_calendar(self.expires_at, "expires_at")
        if self.expires_at is not None and self.expires_in is not None:
            raise ValueError("send expires_at or expires_in, not both")


class Charge(Message):
    """What consume and hold share: a feature and how much of it, or an explicit amount."""

    feature: Name | None = None
    quantity: Micro | None = None
    """Units of the feature, in millionths; 1 unless sent."""
    amount: Micro | None = None
    member: Name | None = None
    occurred_at: Instant | None = None
    metadata: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.feature is None) == (self.amount is None):
            raise ValueError("send feature (with quantity) or amount, one of the two")
        if self.quantity is not None:
            if self.feature is None:
                raise ValueError("quantity goes with feature, not with amount")
            _positive(self.quantity, "quantity")
        elif self.feature is not None:
            self.quantity = Micro(MICRO)
        if self.amount is not None:
            _positive(self.amount, "amount")
        _in_calendar(self.occurred_at, "occurred_at")
        if self.metadata is not None:
            _check_metadata(self.metadata)


class Consume(Charge):
    """``credits.consume``: price a feature and burn the credits."""

    operation: ClassVar[str] = "credits.consume"

    partial: bool = False


class Hold(Charge):
    """``credits.hold``: set credits aside for work in progress."""

    operation: ClassVar[str] = "credits.hold"

    ttl: Annotated[int, msgspec.Meta(ge=1, le=MAX_TTL_SECONDS)] = DEFAULT_TTL_SECONDS
    """Seconds until what was not captured goes back."""


class Capture(Message):
    """``credits.capture``: take the final amount out of a hold."""

    operation: ClassVar[str] = "credits.capture"

    hold: Name
    amount: Micro | None = None
    quantity: Micro | None = None

    def __post_init__(self) -> None:
        if self.amount is not None and self.quantity is not None:
            raise ValueError("send amount or quantity, not both")
        if self.amount is not None:
            _not_negative(self.amount, "amount")
        if self.quantity is not None:
            _not_negative(self.quantity, "quantity")


class Release(Message):
    """``credits.release``: give a hold back whole."""

    operation: ClassVar[str] = "credits.release"

    hold: Name


class Refund(Message):
    """``credits.refund``: give back all or part of a consume or capture."""

    operation: ClassVar[str] = "credits.refund"

    # The field is called as on the wire; the class variable of the base names the task.
    charge: Name = msgspec.field(name="operation")
    amount: Micro | None = None
    actor: Text | None = None
    """The administrator who gives it back; the caller itself unless sent."""
    reason: Text | None = None

    def __post_init__(self) -> None:
        if self.amount is not None:
            _positive(self.amount, "amount")


class Adjust(Message):
    """``credits.adjust``: an administrator's plus or minus."""

    operation: ClassVar[str] = "credits.adjust"

    amount: Micro
    actor: Text
    reason: Text

    def __post_init__(self) -> None:
        if self.amount == 0:
            raise ValueError("amount is 0: nothing would change")


class Revoke(Message):
    """``credits.revoke``: take a grant's or a purchase's credits away."""

    operation: ClassVar[str] = "credits.revoke"

    grant: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None
    purchase: Name | None = None
    amount: Micro | None = None
    reason: Text | None = None

    def __post_init__(self) -> None:
        if (self.grant is None) == (self.purchase is None):
            raise ValueError("send grant or purchase, one of the two")
        if self.amount is not None:
            _positive(self.amount, "amount")


class ClawBack(Message):
    """``credits.claw_back``: so much of what was paid for a purchase is away from the seller.

    It says what is so, not what changed: of a purchase that of the highest step holds, whatever came before or comes
    after. The ledger sends it itself.
    """

    operation: ClassVar[str] = "credits.claw_back"

    purchase: Name
    paid_minor: Annotated[int, msgspec.Meta(ge=0, le=10**15)]
    """What was paid for all of it, in minor units."""
    returned_minor: Annotated[int, msgspec.Meta(ge=0, le=10**15)]
    """What of it refunds returned and disputes hold back; may be more than was paid."""
    step: Annotated[int, msgspec.Meta(ge=1, le=10**15)]
    frozen: bool = False
    """Whether its credits cannot be used meanwhile, since it is disputed."""
    currency: Annotated[str, msgspec.Meta(pattern=r"^[A-Z]{3}\Z")] | None = None


class Settle(Message):
    """``credits.settle``: apply what is due by now, nothing else."""

    operation: ClassVar[str] = "credits.settle"


class Transfer(Message):
    """``credits.transfer``: give credits to another account."""

    operation: ClassVar[str] = "credits.transfer"

    to: Name
    amount: Micro
    message: Text | None = None
    """A word to the recipient."""

    def __post_init__(self) -> None:
        _positive(self.amount, "amount")
        if self.to == self.account:
            raise ValueError("to is the account itself: nothing would change hands")


class Convert(Message):
    """``credits.convert``: a lead has signed up; what is left of its credits goes to the user ``to``, once."""

    operation: ClassVar[str] = "credits.convert"

    to: Name
    after: Name | None = None
    """The lead's operation by which credits came to it after it was converted: the ledger itself sends this, under
    :func:`converting_id`."""

    def __post_init__(self) -> None:
        if self.to == self.account:
            raise ValueError("to is the lead itself: nothing would change hands")


class ByHand(Message):
    """What an administrator does to an account; both words stand in its history."""

    actor: Text
    reason: Text


class FreezeAccount(ByHand):
    """``accounts.freeze``: the account gives no credits out until it is thawed."""

    operation: ClassVar[str] = "accounts.freeze"


class ThawAccount(ByHand):
    """``accounts.thaw``: it may spend again."""

    operation: ClassVar[str] = "accounts.thaw"


class CloseAccount(ByHand):
    """``accounts.close``: it takes no operations any more; what is left of its credits is revoked."""

    operation: ClassVar[str] = "accounts.close"


class ReopenAccount(ByHand):
    """``accounts.reopen``: a closed account is there again, as empty as it was closed."""

    operation: ClassVar[str] = "accounts.reopen"


class SetMember(Message):
    """``pools.set_member``: list a member of a pool, and say how much it may use in a period."""

    operation: ClassVar[str] = "pools.set_member"

    member: Name
    limit: Micro | None = None
    """Credits in a period; none means no limit of its own: the catalog's for all members holds, if it has one."""
    period: Literal["day", "week", "month", "total"] = "month"

    def __post_init__(self) -> None:
        if self.limit is not None:
            _not_negative(self.limit, "limit")


class RemoveMember(Message):
    """``pools.remove_member``: it may use the pool no more; what it holds can still be captured or released."""

    operation: ClassVar[str] = "pools.remove_member"

    member: Name


class IssueCodes(Message):
    """``codes.issue``: make gift codes, paid for by the account, or given by an administrator."""

    operation: ClassVar[str] = "codes.issue"

    codes: Annotated[list[GiftCode], msgspec.Meta(min_length=1, max_length=MAX_CODES)]
    """Their texts, chosen by the sender: see :func:`creditlane.gift_codes.new_code`."""
    amount: Micro
    """Credits for each use."""
    uses: Annotated[int, msgspec.Meta(ge=1, le=MAX_USES)] = 1
    """How often each may be redeemed, in all."""
    per_account: Annotated[int, msgspec.Meta(ge=1, le=MAX_USES)] = 1
    """How often by one account."""
    expires_at: Instant | None = None
    """Until when it can be redeemed; the catalog's ``gifts.code_days`` unless sent, this or the next."""
    expires_in: Lifetime | None = None
    credits_expire_in: Lifetime | None = None
    """Seconds that its credits live from when they are redeemed; only of an administrator's codes: those that an
    account pays for have the ends of the lots that paid."""
    source: Name | None = None
    """Only of an administrator's codes: ``promotion`` unless sent."""
    message: Text | None = None
    """A word to who redeems it."""
    actor: Text | None = None
    """The administrator who gives them: nothing is taken from the account. With a reason, both or neither."""
    reason: Text | None = None

    def __post_init__(self) -> None:
        _positive(self.amount, "amount")
        _in_calendar(self.expires_at, "expires_at")
        if self.expires_at is not None and self.expires_in is not None:
            raise ValueError("send expires_at or expires_in, not both")
        if len(set(self.codes)) < len(self.codes):
            raise ValueError("codes has one twice")
        if (self.actor is None) != (self.reason is None):
            raise ValueError("send actor and reason, both or neither")
        if self.actor is None and (self.source is not None or self.credits_expire_in is not None):
            raise ValueError(
                "source and credits_expire_in are for codes that an administrator gives, with actor and reason"
            )


class RedeemCode(Message):
    """``codes.redeem``: get the credits of a gift code."""

    operation: ClassVar[str] = "codes.redeem"

    code: GiftCode


class WithdrawCodes(Message):
    """``codes.withdraw``: end codes of the account; what was paid for uses that are left comes back."""

    operation: ClassVar[str] = "codes.withdraw"

    codes: Annotated[list[GiftCode], msgspec.Meta(min_length=1, max_length=MAX_CODES)]
    actor: Text | None = None
    reason: Text | None = None

    def __post_init__(self) -> None:
        if len(set(self.codes)) < len(self.codes):
            raise ValueError("codes has one twice")
        if (self.actor is None) != (self.reason is None):
            raise ValueError("send actor and reason, both or neither")


class ConcludeCode(Message):
    """``codes.conclude``: somebody has redeemed a code that the account paid for. The ledger sends it itself."""

    operation: ClassVar[str] = "codes.conclude"

    code: GiftCode
    issue: Name
    """The operation id of the ``codes.issue``."""
    place: Annotated[int, msgspec.Meta(ge=0, lt=MAX_CODES)]
    """The code's place in its list."""
    slot: Annotated[int, msgspec.Meta(ge=0, lt=MAX_USES)]
    """Which use it was, from 0."""
    redeemed_by: Name


class IssueReferral(Message):
    """``referrals.issue``: give the account the code by which it refers others; it has one, for ever."""

    operation: ClassVar[str] = "referrals.issue"

    code: GiftCode


class ClaimReferral(Message):
    """``referrals.claim``: the account says who referred it."""

    operation: ClassVar[str] = "referrals.claim"

    code: GiftCode


class RewardReferral(Message):
    """``referrals.reward``: somebody was referred by the account. The ledger sends it itself."""

    operation: ClassVar[str] = "referrals.reward"

    referee: Name
    code: GiftCode


class Parcel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Credits of one lot on their way to another account, with what they keep of it."""

    source: Name
    amount: Micro
    priority: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    expires_at: Instant | None = None
    unit_price: UnitPrice | None = None
    features: Annotated[list[Name], msgspec.Meta(min_length=1, max_length=MAX_FEATURES)] | None = None
    effective_at: Instant | None = None
    """Where it lies ahead."""

    def __post_init__(self) -> None:
        _positive(self.amount, "amount")
        _in_calendar(self.expires_at, "expires_at")
        _in_calendar(self.effective_at, "effective_at")


class Receive(Message):
    """``credits.receive``: the credit side of a transfer. The ledger sends it itself, to the recipient's lane."""

    operation: ClassVar[str] = "credits.receive"

    sender: Name
    transfer: Name
    """The transfer's operation id, which is the sender's."""
    lots: Annotated[list[Parcel], msgspec.Meta(min_length=1, max_length=MAX_LOTS)]
    message: Text | None = None
    from_lead: bool = False
    """Whether it is no gift, but what a lead had that has signed up."""


class Confirm(Message):
    """``credits.confirm``: the recipient has the credits. The ledger sends it itself, to the sender's lane."""

    operation: ClassVar[str] = "credits.confirm"

    transfer: Name


class Bounce(Message):
    """``credits.bounce``: the recipient cannot take the credits. The ledger sends it itself, to the sender's lane."""

    operation: ClassVar[str] = "credits.bounce"

    transfer: Name
    refused: Code
    """Why."""


def receiving_id(sender: str, transfer: str) -> str:
    """The operation id under which a transfer's credits reach the recipient: the same however often it is sent.

    ``transfer.receive:`` and the SHA-256 of sender and transfer, both with their length in front: an id that a
    producer makes up is the same only if it was computed so.
    """
    return f"{RECEIVING}{_digest(sender, transfer)}"


def concluding_id(sender: str, transfer: str) -> str:
    """The operation id under which the sender learns how a transfer ended.

    One for :class:`Confirm` and :class:`Bounce` alike: of a transfer's two possible ends only one can be applied.
    """
    return f"{CONCLUDING}{_digest(sender, transfer)}"


RESERVED = RECEIVING, CONCLUDING, CONVERTING, REDEEMED, REWARDING = (
    "transfer.receive:", "transfer.conclude:", "lead.convert:", "code.conclude:", "referral.reward:",
)  # fmt: skip
"""What the ids of the ledger's own operations begin with."""


def converting_id(lead: str, to: str, after: str | None = None) -> str:
    """The operation id under which a lead is converted that was named when its user's account was opened.

    :param after: the lead's operation by which credits came to it later, which follow.
    """
    return f"{CONVERTING}{_digest(lead, to) if after is None else _digest(lead, to, after)}"


def redeemed_id(code: str, slot: int) -> str:
    """The operation id under which who paid for a code learns of one of its uses."""
    return f"{REDEEMED}{_digest(code, str(slot))}"


def rewarding_id(referrer: str, referee: str) -> str:
    """The operation id under which a referrer is rewarded for a referee: once."""
    return f"{REWARDING}{_digest(referrer, referee)}"


def normal_code(text: str) -> str:
    """The text of a code as people type it, in the one form that it is kept in: capitals and digits, nothing else.

    >>> normal_code(" abcd-efgh ")
    'ABCDEFGH'
    """
    return "".join(text.split()).replace("-", "").upper()


PAYMENT = "payment."
"""What the ids of operations begin with that follow from a payment."""


def check_reserved(name: str, operation_id: str, message: Message) -> None:
    """Keep the ids of the ledger's own operations for those operations.

    An operation that had such an id before, even a refused one, would keep a transfer from ever ending: an id has one
    answer for ever.

    :raises ContractError: with ``invalid_message``.
    """
    if isinstance(message, Receive):
        derived = operation_id == receiving_id(message.sender, message.transfer)
    elif isinstance(message, Confirm | Bounce):
        derived = operation_id == concluding_id(message.account, message.transfer)
    elif isinstance(message, ConcludeCode):
        derived = operation_id == redeemed_id(message.code, message.slot)
    elif isinstance(message, RewardReferral):
        derived = operation_id == rewarding_id(message.account, message.referee)
    elif isinstance(message, Convert) and (operation_id.startswith(CONVERTING) or message.after is not None):
        derived = operation_id == converting_id(message.account, message.to, message.after)
    elif isinstance(message, ClawBack):
        if not operation_id.startswith(PAYMENT):
            raise ContractError(Code.INVALID_MESSAGE, f"{name} under this id: it follows from a payment alone")
        return
    else:
        derived = not operation_id.startswith(RESERVED)
    if not derived:
        reason = f"{name} under this id: ids that begin with {', '.join(RESERVED)} are derived by the ledger"
        raise ContractError(Code.INVALID_MESSAGE, reason)


def _digest(*names: str) -> str:
    parts = [name.encode() for name in names]
    return sha256(b"".join(b"%d:%s" % (len(part), part) for part in parts)).hexdigest()


class Paid(Message, kw_only=True):
    """What the operations share that a payment may stand behind."""

    payment: Name | None = None
    """What was paid by: the purchase of the lots that it pays for, so that a refund finds them."""
    unit_price: UnitPrice | None = None
    """What was paid; the catalog's price unless sent."""
    period_start: Instant | None = None
    """When what is paid for begins; now unless sent."""
    period_end: Instant | None = None
    """When it ends; one month or year later, as the plan is paid for, unless sent."""

    def __post_init__(self) -> None:
        _in_calendar(self.period_start, "period_start")
        _in_calendar(self.period_end, "period_end")
        if self.period_start is not None and self.period_end is not None and self.period_end <= self.period_start:
            raise ValueError("period_end is not after period_start")


class Subscribe(Paid):
    """``plans.subscribe``: begin a plan; the first period's credits come at once."""

    operation: ClassVar[str] = "plans.subscribe"

    plan: Name


class ChangePlan(Paid):
    """``plans.change``: to a higher plan at once, to a lower one with the next renewal."""

    operation: ClassVar[str] = "plans.change"

    plan: Name


class CancelPlan(Message):
    """``plans.cancel``: end the plan with its period, or now."""

    operation: ClassVar[str] = "plans.cancel"

    at: Literal["period_end", "now"] = "period_end"
    reason: Text | None = None


class RenewPlan(Paid):
    """``plans.renew``: a payment for the next period has arrived."""

    operation: ClassVar[str] = "plans.renew"

    period_start: Instant
    """When what is paid for begins: however many messages tell of a payment, its period is given once."""
    plan: Name | None = None
    """Which plan was paid for; the present one, or the one that was changed to, unless sent."""


class UndoRenewal(Message):
    """``plans.undo``: an administrator takes back what the last renewal did."""

    operation: ClassVar[str] = "plans.undo"

    actor: Text
    reason: Text


class Batch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``credits.batch``: many operations of one lane in one message, each succeeding or failing by itself."""

    operations: Annotated[list[tuple[str, Name, msgspec.Raw]], msgspec.Meta(min_length=1, max_length=MAX_BATCH)]
    v: Literal[1] = 1


BATCH = "credits.batch"

OPERATIONS: dict[str, type[Message]] = {
    kind.operation: kind
    for kind in (
        Open, Grant, Consume, Hold, Capture, Release, Refund, Adjust, Revoke, ClawBack, Settle, Transfer, Receive,
        Confirm, Bounce, Convert, FreezeAccount, ThawAccount, CloseAccount, ReopenAccount, SetMember, RemoveMember,
        IssueCodes, RedeemCode, WithdrawCodes, ConcludeCode, IssueReferral, ClaimReferral, RewardReferral, Subscribe,
        ChangePlan, CancelPlan, RenewPlan, UndoRenewal,
    )
}  # fmt: skip
"""Every operation of the ledger by its task name."""

INTERNAL = frozenset(kind.operation for kind in (Receive, Confirm, Bounce, ClawBack, ConcludeCode, RewardReferral))
"""Operations that the ledger sends itself; they are refused under any id but one of its own, see
:func:`check_reserved`."""


class Balance(msgspec.Struct, kw_only=True, frozen=True):
    """An account's credits: spendable now, set aside, owed, and the spendable ones by source."""

    available: Decimal
    held: Decimal = Decimal(0)
    debt: Decimal = Decimal(0)
    upcoming: Decimal = Decimal(0)
    """Credits of grants that take effect later; not part of ``available``."""
    frozen: Decimal = Decimal(0)
    """Credits of disputed purchases, which cannot be used for now; not part of ``available``, nor of ``upcoming``."""
    in_transit: Decimal = Decimal(0)
    """Credits on their way to another account; not part of ``available``."""
    by_source: dict[str, Decimal] = {}


class GrantUse(msgspec.Struct, kw_only=True, frozen=True):
    """How many credits one grant gave to (or got from) an operation."""

    grant: int
    source: str
    amount: Decimal


class MemberUse(msgspec.Struct, kw_only=True, frozen=True):
    """How a member of a pool stands after an operation that counts."""

    member: str
    period: Literal["day", "week", "month", "total"]
    since: datetime
    """When the period began, or the first instant of all."""
    counted: Decimal
    """What of the operation counts in this period."""
    limit: Decimal | None = None
    left: Decimal | None = None
    """What the member may use yet; none without a limit."""
    period_end: datetime | None = None
    """The first instant after the period; none of ``total``."""


class Achieved(msgspec.Struct, kw_only=True, frozen=True):
    """An achievement that an operation brought."""

    achievement: str
    """Its name in the catalog."""
    credits: Decimal
    grant: int | None = None
    """The grant that its credits are in; None where it comes with none."""


class Result(msgspec.Struct, kw_only=True, frozen=True):
    """The answer to one operation.

    ``status`` is ``applied``, ``rejected`` (a refusal, with ``code``) or ``quarantined`` (only as a
    member of a batch; by itself such a message fails as a task). ``charged`` is in credits. A refusal
    for want of credits has ``required``, ``available`` and ``shortfall``. ``replayed`` says that this
    id was answered before and that this is the first answer.
    """

    operation: str
    id: str
    status: Literal["applied", "rejected", "quarantined"]
    account: str | None = None
    code: Code | None = None
    reason: str | None = None
    charged: Decimal = Decimal(0)
    balance: Balance | None = None
    grants: list[GrantUse] = []
    grant: int | None = None
    """The number of the grant that a grant or an adjustment made."""
    hold: str | None = None
    expires_at: datetime | None = None
    """When the hold's time runs out, or that of the first of the codes that were issued."""
    owed: Decimal | None = None
    """What a revocation turned into debt, because it was spent."""
    forgiven: Decimal | None = None
    """What a revocation did not take back, because it was spent and the catalog forgives it."""
    required: Decimal | None = None
    available: Decimal | None = None
    shortfall: Decimal | None = None
    offer: dict[str, Any] | None = None
    plan: str | None = None
    """For ``plans.…``: the plan, or the last one."""
    plan_status: Literal["active", "cancelled", "ended"] | None = None
    """``cancelled`` ends with its period."""
    plan_next: str | None = None
    """The plan from the next renewal on, where that is another."""
    period_start: datetime | None = None
    period_end: datetime | None = None
    paid_until: datetime | None = None
    allotted: Decimal | None = None
    """What the operation added of the plan's credits."""
    expired: Decimal | None = None
    """What ended by it."""
    taken_back: Decimal | None = None
    """What was taken of lots; for ``credits.grant`` because its purchase was returned before."""
    restored: Decimal | None = None
    """What came back of what had ended; for ``credits.claw_back`` of what had been taken, debts included."""
    frozen: Decimal | None = None
    """For ``credits.claw_back``: the credits that cannot be used any more; ``thawed``: those that can be used again."""
    thawed: Decimal | None = None
    to: str | None = None
    """Who a transfer's credits are on their way to."""
    sender: str | None = None
    """Who the credits came from."""
    transfer: str | None = None
    """The sender's operation id of the transfer that this operation belongs to."""
    refused: Code | None = None
    """Why a transfer came back."""
    converted_to: str | None = None
    """Of a refusal: who this lead has become."""
    account_status: Literal["open", "frozen", "closed"] | None = None
    """For ``accounts.…``: what the account is now."""
    open_holds: list[str] = []
    """Of a refusal to close an account: holds that are open, the first of them."""
    gift_code: str | None = None
    """For ``codes.redeem`` and ``codes.conclude``: the code."""
    credits: Decimal | None = None
    """What one use of it gives."""
    message: str | None = None
    """The word of who issued it."""
    codes: int | None = None
    """How many gift codes an operation made or ended."""
    member: str | None = None
    """The member of a pool that was listed or removed, or whose limit refused it."""
    limit: Decimal | None = None
    """What that member may use in a period."""
    allowance: MemberUse | None = None
    """For what a member of a pool is charged: how it stands then, where it is counted."""
    referral: str | None = None
    """What became of a referral code: ``claimed``, or why ``credits.open`` went on without."""
    referral_code: str | None = None
    """By which code the account refers others."""
    referrer: str | None = None
    """Who referred the account."""
    referee: str | None = None
    """Who was referred by it."""
    bonus: Decimal | None = None
    """What came for a referral."""
    achieved: list[Achieved] = []
    """The achievements that it brought, each once for ever."""
    replayed: bool = False

    @property
    def applied(self) -> bool:
        """Whether the operation changed the ledger (now, or at its first delivery)."""
        return self.status == "applied"


def _positive(amount: int, field: str) -> None:
    if amount <= 0:
        raise ValueError(f"{field} must be more than 0")


def _not_negative(amount: int, field: str) -> None:
    if amount < 0:
        raise ValueError(f"{field} must not be negative")


def _in_calendar(instant: datetime | None, field: str) -> None:
    if instant is None:
        return
    if not FIRST_INSTANT <= instant < LAST_INSTANT:
        raise ValueError(f"{field} must lie between the years 1970 and 8999")
    if abs(instant.utcoffset() or timedelta()) > MAX_OFFSET:
        raise ValueError(f"{field} has an offset of more than 15 hours; send it in UTC")


def _check_metadata(metadata: dict[str, Any]) -> None:
    level: list[Any] = [metadata]
    for _ in range(MAX_METADATA_DEPTH):
        below = [item.values() if isinstance(item, dict) else item for item in level]
        level = [value for values in below for value in values if isinstance(value, dict | list)]
        if not level:
            break
    else:
        raise ValueError(f"metadata has more than {MAX_METADATA_DEPTH} levels")
    encoded = msgspec.json.encode(metadata)
    if len(encoded) > MAX_METADATA_BYTES:
        raise ValueError(f"metadata is at most {MAX_METADATA_BYTES} bytes as JSON")
    if _NUL.search(encoded):
        raise ValueError("metadata holds a NUL character; leave it out")


def _decode_hook(kind: type, value: object) -> Any:
    if kind is Micro:
        return Micro(parse_amount(value))
    raise NotImplementedError(kind)


_decoders: dict[str, msgspec.json.Decoder[Message]] = {
    name: msgspec.json.Decoder(kind, dec_hook=_decode_hook) for name, kind in OPERATIONS.items()
}
_batch_decoder = msgspec.json.Decoder(Batch)


class _Versioned(msgspec.Struct):
    v: int = VERSION


_version_decoder = msgspec.json.Decoder(_Versioned)


class ContractError(ValueError):
    """A message that does not fit the contract: ``code`` for programs, the text for people."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def decode_message(name: str, arguments: bytes | msgspec.Raw) -> Message:
    """Check an operation's arguments and read them into its type.

    :param name: the task's name, such as ``credits.consume``.
    :param arguments: its keyword arguments as a JSON object.
    :raises ContractError: with ``unknown_operation``, ``unknown_version`` or ``invalid_message`` and a
        sentence that names the field.
    """
    try:
        decoder = _decoders[name]
    except KeyError:
        unknown = ContractError(Code.UNKNOWN_OPERATION, f"{name[:MAX_NAME]!r} is no operation of the ledger")
        raise _newer_version(arguments) or unknown from None
    try:
        return decoder.decode(arguments)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _contract_error(arguments, error) from None


def decode_batch(arguments: bytes | msgspec.Raw) -> Batch:
    """Read a batch; its members stay undecoded, so that each can fail by itself.

    :raises ContractError: as :func:`decode_message`.
    """
    try:
        return _batch_decoder.decode(arguments)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _contract_error(arguments, error) from None


def is_plain(text: object) -> TypeGuard[str]:
    """Whether it is a :data:`Name` at a glance: most are ASCII; of others the pattern decides."""
    return type(text) is str and 0 < len(text) <= MAX_NAME and text.isascii() and text.isprintable()


def check_id(operation_id: object) -> str:
    """Check an operation id: 1 to 128 characters, no control characters, no lone surrogates.

    :raises ContractError: with ``invalid_message``.
    """
    if is_plain(operation_id):
        return operation_id
    try:
        return msgspec.convert(operation_id, Name)
    except (msgspec.ValidationError, ValueError) as error:
        raise ContractError(Code.INVALID_MESSAGE, f"the operation id (task id): {error}") from None


def _contract_error(arguments: bytes | msgspec.Raw, error: Exception) -> ContractError:
    reason = str(error)[:MAX_TEXT] or type(error).__name__
    return _newer_version(arguments) or ContractError(Code.INVALID_MESSAGE, reason)


def _newer_version(arguments: bytes | msgspec.Raw) -> ContractError | None:
    """A message of a newer contract is parked for newer workers, whatever else is wrong with it."""
    try:
        version = _version_decoder.decode(arguments).v
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if version <= VERSION:
        return None
    return ContractError(
        Code.UNKNOWN_VERSION, f"the message is of contract version {version}, this side knows {VERSION}"
    )


__all__ = [
    "BATCH",
    "INTERNAL",
    "MAX_MICRO",
    "OPERATIONS",
    "Achieved",
    "Adjust",
    "Balance",
    "Batch",
    "Bounce",
    "Capture",
    "Charge",
    "ClawBack",
    "Confirm",
    "Consume",
    "ContractError",
    "Grant",
    "GrantUse",
    "Hold",
    "Message",
    "Open",
    "Parcel",
    "Receive",
    "Refund",
    "Release",
    "Result",
    "Revoke",
    "Settle",
    "Transfer",
    "UnitPrice",
    "check_id",
    "check_reserved",
    "concluding_id",
    "decode_batch",
    "decode_message",
    "is_plain",
    "receiving_id",
]
