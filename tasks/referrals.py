"""Referrals: an account brings another, and both get credits for it, once (ledger rules: codes, referrals).

Who refers has a code. Who was referred claims it in its own lane, where its bonus comes as well: at once, or with its
first purchase, as the catalog says. What follows from that is ``referrals.reward`` in the referrer's lane, under an id
that is derived from both: so often as it is sent, there is one reward for a referee.

An account is referred once in its life, so it has one bonus as a referee whomever it names. That two refer each other
is seen on either side: a claim is refused by who has been rewarded for the code's owner, a reward by who was referred
by the referee. Each looks at its own account alone; where both claim at once, neither is rewarded for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import wraps
from typing import Any

import msgspec

from creditlane.amounts import format_amount
from creditlane.codes import Code
from creditlane.contract import (
    VERSION,
    ClaimReferral,
    Grant,
    IssueReferral,
    Message,
    Paid,
    RewardReferral,
    rewarding_id,
)
from models.rules.allowances import count, used_in
from models.rules.burning import Plan, came_in, new_grant, room_of
from models.rules.claw_back import come_due
from models.rules.posting import post
from models.rules.refusal import RefusedError
from models.rules.sharing import REFEREE, REFERRAL, REFERRED, Referral, SharedCode, Terms, row_of
from models.rules.state import MAX_OPEN_GRANTS, Account
from tasks.operation import Context, FollowUp, Need, Outcome, operation

CLAIMED = "claimed"
"""What an opening says of its referral code when that was taken."""

_OWN = Need("referral", "")
"""What is known of the account's own referrals."""


# --- The code ----------------------------------------------------------------------------------------


@operation(IssueReferral, need=lambda message: (_OWN, Need("code", message.code)), spends=True)
def issue_referral(account: Account, message: IssueReferral, context: Context) -> Outcome:
    """Give a user or a pool the code by which it refers others.

    It has one for ever: where it has one, that is the answer, whichever was asked for, and nothing changes. Refusals:
    ``account_frozen``; ``invalid`` for a lead, which has not signed up itself; ``code_exists``.
    """
    if account.kind == "lead":
        raise RefusedError(Code.INVALID, "a lead refers nobody; issue the code to the user that it becomes")
    if account.referral is not None and account.referral.code is not None:
        return Outcome(details={"referral_code": account.referral.code})
    if message.code in account.codes:
        raise RefusedError(Code.CODE_EXISTS, existing=[message.code])
    terms = Terms(code=message.code, kind=REFERRAL, account=account.account, operation=context.operation)
    code = account.codes[message.code] = SharedCode(terms)
    code.is_new = True
    _own(account).code = message.code
    return Outcome(details={"referral_code": message.code})


def _own(account: Account) -> Referral:
    """What is known of an account's referrals, to be changed."""
    referral = account.referral
    if referral is None:
        referral = account.referral = Referral()
    referral.is_dirty = account.is_dirty = True
    return referral


# --- The claim ---------------------------------------------------------------------------------------


@operation(
    ClaimReferral,
    need=lambda message: (_OWN, Need("code", message.code), Need("referee", message.code)),
    spends=True,
)
def claim(account: Account, message: ClaimReferral, context: Context) -> Outcome:
    """Note who referred the account, a user; where the catalog gives its bonus with the claim, it comes at once.

    Refusals: ``account_frozen``; ``invalid`` for what is no user; ``code_unknown``; ``code_expired`` for a code that
    was closed, or when ``claim_days`` since the account's opening are over; ``self_referral`` for its own code, and for
    that of an account that it was rewarded for; ``already_referred``; ``limit_reached``. (ledger rules: referrals)
    """
    code = account.codes.get(message.code)
    refusal = _hindrance(account, code, context)
    at_once = context.catalog.referrals.trigger == "sign_up"
    if refusal is None and at_once and not _has_room_as_referee(account, context):
        refusal = RefusedError(Code.LIMIT_REACHED, "the account cannot take the bonus; spend some of its grants first")
    if refusal is not None:
        refusal.details.update(_said(code))
        raise refusal
    assert code is not None
    return _claimed(account, code, Outcome(), context)


def claim_with_opening(account: Account, text: str, outcome: Outcome, context: Context) -> Outcome:
    """Claim a code for an account that has just been opened; a bad one changes nothing.

    :param outcome: the opening's, without all that.
    :returns: with the bonus and the follow-up, where the code was good; the details tell ``referral``, ``claimed`` or
        the code of the refusal.
    """
    code = account.codes.get(text)
    refusal = _hindrance(account, code, context)
    if refusal is not None:
        return _with(outcome, {"referral": refusal.code.value, **_said(code)})
    assert code is not None
    return _claimed(account, code, outcome, context)


def _said(code: SharedCode | None) -> dict[str, Any]:
    """What a replay must know of a code, whose row is not the account's; one of another kind is as good as none."""
    return {} if code is None or code.terms.kind != REFERRAL else {"code_row": row_of(code)}


def _hindrance(account: Account, code: SharedCode | None, context: Context) -> RefusedError | None:
    """Why an account cannot claim a code; the first reason of the list of codes."""
    if account.kind != "user":
        return RefusedError(Code.INVALID, "only a user is referred; send the code with the opening of its account")
    if code is None or code.terms.kind != REFERRAL:
        return RefusedError(Code.CODE_UNKNOWN)
    if code.status != "open":
        return RefusedError(Code.CODE_EXPIRED)
    days = context.catalog.referrals.claim_days
    if days is not None and account.opened_at is not None and context.now >= account.opened_at + timedelta(days=days):
        return RefusedError(Code.CODE_EXPIRED, f"a referral is claimed within {days} days of the account's opening")
    owner = code.terms.account
    if owner == account.account or REFEREE + owner in account.allowances:
        return RefusedError(Code.SELF_REFERRAL)
    if account.referral is not None and account.referral.referrer is not None:
        return RefusedError(Code.ALREADY_REFERRED)
    return None


def _claimed(account: Account, code: SharedCode, outcome: Outcome, context: Context) -> Outcome:
    referral = _own(account)
    referral.referrer = code.terms.account
    referral.claimed_code = code.terms.code
    referral.claimed_at = context.now
    outcome = _with(outcome, {"referral": CLAIMED, "referrer": referral.referrer, **_said(code)})
    if context.catalog.referrals.trigger == "sign_up":
        return _settled(account, outcome, context)
    return outcome


# --- The referee's bonus -----------------------------------------------------------------------------


def _settled(account: Account, outcome: Outcome, context: Context) -> Outcome:
    """Give a referee its bonus with an operation, and have its referrer rewarded; once for ever.

    By the catalog in force now. If the account cannot take it, the claim waits for the next purchase.

    :param outcome: the operation's, without all that.
    """
    if not _has_room_as_referee(account, context):
        return outcome
    referral = _own(account)
    assert referral.referrer is not None
    assert referral.claimed_code is not None
    referral.settled_at = context.now
    uses, details = _bonus(account, int(context.catalog.referrals.referee), context)
    follow = rewarding(referral.referrer, account.account, referral.claimed_code)
    return _with(outcome, {"referrer": referral.referrer, **details}, uses, [follow])


def _with(
    outcome: Outcome, details: dict[str, Any], uses: Plan | None = None, follow: Sequence[FollowUp] = ()
) -> Outcome:
    """What an operation answers, and what a referral adds to it."""
    return msgspec.structs.replace(
        outcome,
        details={**(outcome.details or {}), **details},
        uses=[*outcome.uses, *(uses or ())],
        follow=[*outcome.follow, *follow],
    )


def _has_room_as_referee(account: Account, context: Context) -> bool:
    return _has_room(account, int(context.catalog.referrals.referee))


def _has_room(account: Account, amount_micro: int) -> bool:
    return not amount_micro or (account.open_grants() < MAX_OPEN_GRANTS and amount_micro <= room_of(account))


def _bonus(account: Account, amount_micro: int, context: Context) -> tuple[Plan, dict[str, str]]:
    """A lot of the catalog's referral credits; nothing where it gives none.

    :returns: the lot with its credits, and what the result tells of it.
    """
    if not amount_micro:
        return [], {}
    terms, now = context.catalog.referrals, context.now
    lot = new_grant(
        account,
        source=terms.source,
        priority=context.catalog.priority_of(terms.source),
        expires_at=None if terms.expires_days is None else now + timedelta(days=terms.expires_days),
        now=now,
        operation=context.operation,
    )
    post(account, lot, "granted", amount_micro, now, context.operation)
    come_due(account, lot, now, context.operation, context.catalog)
    came_in(account, now)
    return [(lot, amount_micro)], {"bonus": format_amount(amount_micro)}


Run = Callable[[Account, Any, Context], Outcome]


def purchase_needs(message: Message) -> Sequence[Need]:
    """What an operation needs that may be a purchase: what is known of who referred the account."""
    return (_OWN,) if _paid_by(message) is not None else ()


def may_be_purchase(run: Run) -> Run:
    """Have an operation give a referee's bonus whose claim waits for a purchase, where it is one.

    A purchase is what names one, or a payment that is not the plan's last one told again, and was not free.
    """

    @wraps(run)
    def run_and_settle(account: Account, message: Any, context: Context) -> Outcome:
        subscription = account.subscription
        before = None if subscription is None else subscription.payment
        outcome = run(account, message, context)
        referral = account.referral
        if referral is None or referral.referrer is None or referral.settled_at is not None:
            return outcome
        paid_by = _paid_by(message)
        if paid_by is None or (isinstance(message, Paid) and paid_by == before):
            return outcome
        return _settled(account, outcome, context)

    return run_and_settle


def _paid_by(message: Message) -> str | None:
    """The purchase or the payment that a message names, unless it cost nothing."""
    if not isinstance(message, Grant | Paid):
        return None
    if message.unit_price is not None and not message.unit_price.minor:
        return None
    return message.purchase if isinstance(message, Grant) else message.payment


# --- The referrer's ----------------------------------------------------------------------------------


def rewarding(referrer: str, referee: str, code: str) -> FollowUp:
    """What rewards a referrer for a referee; the same each time it is made.

    :param code: the one that was claimed.
    """
    arguments = {"account": referrer, "referee": referee, "code": code, "v": VERSION}
    return FollowUp(RewardReferral.operation, rewarding_id(referrer, referee), arguments)


@operation(
    RewardReferral,
    need=lambda message: (_OWN, Need("allowance", REFEREE + message.referee), Need("allowance", REFERRED)),
)
def reward(account: Account, message: RewardReferral, context: Context) -> Outcome:
    """Count a referee of the account, and give what the catalog gives for one.

    The catalog in force decides how much, and for how many, in a day and in all; what is refused stays so, and the
    referee keeps its own. Refusals: ``account_closed``; ``invalid`` under another id than the pair's;
    ``code_unknown`` for a code that is not the account's; ``self_referral`` where the referee referred the account;
    ``limit_reached``; ``daily_limit``.
    """
    referral = account.referral
    if context.operation != rewarding_id(account.account, message.referee):
        raise RefusedError(Code.INVALID, "only the ledger itself sends this, under an id that it derives")
    if referral is None or referral.code != message.code:
        raise RefusedError(Code.CODE_UNKNOWN, "this is not the account's referral code")
    if message.referee in (account.account, referral.referrer):
        raise RefusedError(Code.SELF_REFERRAL)
    terms, now, zone = context.catalog.referrals, context.now, context.catalog.catalog.zone
    amount = int(terms.referrer)
    if terms.per_referrer is not None and referral.referees >= terms.per_referrer:
        raise RefusedError(Code.LIMIT_REACHED, f"an account is rewarded for {terms.per_referrer} referees")
    if not _has_room(account, amount):
        raise RefusedError(Code.LIMIT_REACHED, "the account cannot take the credits")
    if terms.per_day is not None and used_in(account, REFERRED, "day", now, zone)[1] >= terms.per_day:
        raise RefusedError(Code.DAILY_LIMIT, f"an account is rewarded for {terms.per_day} referees a day")
    uses, details = _bonus(account, amount, context)
    _own(account).referees += 1
    count(account, REFEREE + message.referee, "total", amount, now, zone)
    if terms.per_day is not None:
        count(account, REFERRED, "day", amount, now, zone)
    return Outcome(uses=uses, details={"referee": message.referee, **details})
