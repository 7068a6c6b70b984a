"""Gift codes: credits for whoever names them first (ledger rules: codes, referrals).

The row of a code is locked while a batch that names it is applied, and decides who was in time; what it said is kept
with each answer, so that a replay of one account alone is told the same. An account that pays for codes has the credits
in transit until somebody redeems them, which ``codes.conclude`` tells it, once for each use, or until the code ends,
by ``codes.withdraw``. Use k of the i-th code of an issue is a stretch of its own of the credits that paid, so
it does not matter in which order the ends of the uses come.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import msgspec

from creditlane.amounts import format_amount
from creditlane.codes import Code
from creditlane.contract import (
    VERSION,
    ConcludeCode,
    IssueCodes,
    Parcel,
    RedeemCode,
    WithdrawCodes,
    decode_message,
    redeemed_id,
)
from models.rules.allowances import count, used_in
from models.rules.burning import Plan, burn, check_room, come_back, new_grant
from models.rules.posting import post
from models.rules.refusal import RefusedError
from models.rules.sharing import (
    CLOSED,
    CODE,
    GIFT,
    REDEEMED,
    EndToEnd,
    Redemption,
    SharedCode,
    Terms,
    encode_row,
    fingerprint,
    of_wire,
    row_of,
)
from models.rules.state import Account, Grant, Known
from tasks.gifts import GIFT_NEED, check_gift, count_gift, plan_gift
from tasks.grants import check_grant_limit, credit
from tasks.operation import Context, FollowUp, Need, Outcome, operation
from tasks.transfers import parcel_of, take_in

PROMOTION = "promotion"
"""The source of the credits of an administrator's codes, unless another is named."""

NAMED = 5
"""Codes that a refusal names at the most."""


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(encode_row(value))


@operation(IssueCodes, need=lambda message: (GIFT_NEED, *(Need("code", code) for code in message.codes)), spends=True)
def issue(account: Account, message: IssueCodes, context: Context) -> Outcome:
    """Make gift codes of ``amount`` credits a use, paid for by the account, or given by an administrator.

    Paid for as a transfer is: by unscoped lots that may be given away, for all uses at once. The i-th code has the
    i-th part of what those lots gave, in order, and ends no later than the soonest of its lots to end. Each use counts
    as a gift of the day. An administrator's codes (``actor``, ``reason``) take nothing; their credits have the source
    ``promotion`` unless another is named. Refusals: ``account_frozen``; ``invalid`` (it would have ended);
    ``code_exists``; ``daily_limit``; ``insufficient_credits``; ``not_transferable``. (ledger rules: codes)
    """
    seconds = message.expires_in or context.catalog.gifts.code_days * 86400
    expires_at = message.expires_at or context.now + timedelta(seconds=seconds)
    if expires_at <= context.now:
        raise RefusedError(Code.INVALID, "expires_at is not after the present")
    existing = [code for code in message.codes if code in account.codes][:NAMED]
    if existing:
        raise RefusedError(Code.CODE_EXISTS, existing=existing)
    share = int(message.amount) * message.uses
    total = 0
    plan: Plan = []
    if message.actor is None:
        total = share * len(message.codes)
        gifts_made = message.uses * len(message.codes)
        check_gift(account, total, context, gifts_made)
        plan = plan_gift(account, total, context)
        count_gift(account, total, context, gifts_made)
    laid = EndToEnd(plan)
    made = []
    for place, text in enumerate(message.codes):
        lots = laid.cut(place * share, (place + 1) * share) if plan else []
        ends = [grant.expires_at for grant, _ in lots if grant.expires_at is not None]
        terms = Terms(
            code=text,
            kind=GIFT,
            account=account.account,
            operation=context.operation,
            place=place,
            amount=int(message.amount),
            uses=message.uses,
            per_account=message.per_account,
            expires_at=min([expires_at, *ends]),
            credits_seconds=message.credits_expire_in,
            source=None if message.actor is None else message.source or PROMOTION,
            lots=tuple(_parcel(grant, taken) for grant, taken in lots),
            message=message.message,
        )
        code = account.codes[text] = SharedCode(terms)
        code.is_new = True
        made.append(terms)
    receipt = burn(account, plan, "transferred", context.now, context.operation) if plan else None
    details = {
        "codes": len(made),
        "expires_at": min(terms.expires_at for terms in made if terms.expires_at is not None),
        "terms": [fingerprint(encode_row(terms)) for terms in made],
    }
    return Outcome(total, plan, receipt, details)


def _parcel(grant: Grant, amount_micro: int) -> Parcel:
    return msgspec.convert(parcel_of(grant, amount_micro), Parcel, dec_hook=of_wire)


@operation(
    RedeemCode,
    need=lambda message: (
        Need("code", message.code), Need("allowance", CODE + message.code), Need("allowance", REDEEMED),
    ),
)  # fmt: skip
def redeem(account: Account, message: RedeemCode, context: Context) -> Outcome:
    """Get the credits of a gift code, if it has a use left.

    Of a code that somebody paid for, as with a transfer: a lot for each one that paid, of its source, priority, expiry
    and unit price; so whoever redeems its own code has moved its credits, and gained nothing. Of an administrator's, a
    lot of the code's source. A debt is paid first. Refusals: ``code_unknown`` (a referral code is none either);
    ``code_expired`` (withdrawn, or over); ``code_used`` (in all, or by this account as often as it may);
    ``daily_limit``; ``limit_reached``. (ledger rules: codes)
    """
    code = account.codes.get(message.code)
    if code is None or code.terms.kind != GIFT:
        raise RefusedError(Code.CODE_UNKNOWN)
    row = _raw(row_of(code, to_use=True))
    try:
        return _redeem(account, code, context, row)
    except RefusedError as refusal:
        refusal.details["code_row"] = row
        raise


def _redeem(account: Account, code: SharedCode, context: Context, row: msgspec.Raw) -> Outcome:
    terms, now, zone = code.terms, context.now, context.catalog.catalog.zone
    key, slot = CODE + terms.code, code.uses
    if code.is_over(now):
        raise RefusedError(Code.CODE_EXPIRED)
    used = used_in(account, key, "total", now, zone)[1]
    if code.is_used_up or (terms.per_account is not None and used >= terms.per_account):
        raise RefusedError(Code.CODE_USED)
    redeems = context.catalog.gifts.redeems_per_day
    if redeems is not None and used_in(account, REDEEMED, "day", now, zone)[1] >= redeems:
        raise RefusedError(Code.DAILY_LIMIT, f"an account may redeem {redeems} codes a day")
    details: dict[str, Any] = {"gift_code": terms.code, "credits": format_amount(terms.amount)}
    follow = []
    if terms.is_paid:
        uses = take_in(account, code.lots_of(slot), context)
        details["sender"] = terms.account
        follow.append(concluding(terms, slot, account.account))
    else:
        uses = _give(account, terms, context)
    count(account, key, "total", terms.amount, now, zone)
    if redeems is not None:
        count(account, REDEEMED, "day", terms.amount, now, zone)
    code.taken[slot] = Redemption(account.account, context.operation, terms.amount, now)
    if terms.message is not None:
        details["message"] = terms.message
    return Outcome(uses=uses, details={**details, "code_row": row}, follow=follow)


def _give(account: Account, terms: Terms, context: Context) -> Plan:
    """Credits that nobody paid for."""
    assert terms.source is not None
    check_grant_limit(account)
    check_room(account, terms.amount)
    seconds = terms.credits_seconds
    lot = new_grant(
        account,
        source=terms.source,
        priority=context.catalog.priority_of(terms.source),
        expires_at=None if seconds is None else context.now + timedelta(seconds=seconds),
        now=context.now,
        operation=context.operation,
    )
    credit(account, lot, terms.amount, context)
    return [(lot, terms.amount)]


def concluding(terms: Terms, slot: int, redeemed_by: str) -> FollowUp:
    """What tells who paid for a code of one of its uses; the same each time it is made."""
    return FollowUp(
        ConcludeCode.operation,
        redeemed_id(terms.code, slot),
        {
            "account": terms.account, "code": terms.code, "issue": terms.operation, "place": terms.place, "slot": slot,
            "redeemed_by": redeemed_by, "v": VERSION,
        },
    )  # fmt: skip


@operation(ConcludeCode, need=lambda message: (Need("transfer", message.issue),), concludes=True)
def conclude(account: Account, message: ConcludeCode, context: Context) -> Outcome:
    """Somebody has redeemed a code that the account paid for: the credits of that use are in transit no more, but sent.

    Refusals: ``code_unknown``; ``invalid`` under another id than that use's.
    """
    if context.operation != redeemed_id(message.code, message.slot):
        raise RefusedError(Code.INVALID, "only the ledger itself sends this, under an id that it derives")
    known = account.known.get(message.issue)
    issued = None if known is None else _issue_of(known)
    if known is None or issued is None or issued.codes[message.place : message.place + 1] != [message.code]:
        raise RefusedError(Code.CODE_UNKNOWN)
    if message.slot >= issued.uses:
        raise RefusedError(Code.CODE_UNKNOWN, "the code has not so many uses")
    start = (message.place * issued.uses + message.slot) * int(issued.amount)
    uses = _paid(account, known, start, start + int(issued.amount))
    for grant, amount in uses:
        post(account, grant, "sent", amount, context.now, context.operation, message.issue)
    details = {"gift_code": message.code, "credits": format_amount(issued.amount), "to": message.redeemed_by}
    return Outcome(uses=uses, details=details)


def _issue_of(known: Known) -> IssueCodes | None:
    """The message of an issue that the account paid for; none of any other operation."""
    if known.name != IssueCodes.operation or known.lines is None:
        return None
    if known.message is None:
        assert known.arguments is not None
        known.message = decode_message(known.name, known.arguments)
    assert isinstance(known.message, IssueCodes)
    return known.message


def _paid(account: Account, known: Known, start: int, end: int) -> Plan:
    """A stretch of what paid for an issue, in transit still: of other credits the lots may not be at hand."""
    laid = EndToEnd([(line.grant, line.taken) for line in known.lines or ()])
    return [(account.grants[grant], amount) for grant, amount in laid.cut(start, end)]


@operation(
    WithdrawCodes, need=lambda message: [Need("code", code) for code in message.codes], concludes=True
)  # fmt: skip
def withdraw(account: Account, message: WithdrawCodes, context: Context) -> Outcome:
    """End codes of the account. What it paid for the uses that are left comes back; what is ended already stays so.

    What has expired meanwhile lapses at once; what comes back pays debt first (ledger rules: release, claw-back).
    Codes that an administrator gave are ended by one (``actor``, ``reason``), or once their time is over. Refusals:
    ``invalid``; ``code_unknown`` when one is none of the account's.
    """
    own = [
        code
        for code in map(account.codes.get, message.codes)
        if code is not None and code.terms.kind == GIFT and code.terms.account == account.account
    ]
    rows = [_raw(row_of(code)) for code in own]
    if message.actor is None and not all(code.terms.is_paid or code.is_over(context.now) for code in own):
        raise RefusedError(Code.INVALID, "an administrator gave a code of these; say actor and reason", code_rows=rows)
    if len(own) < len(message.codes):
        raise RefusedError(Code.CODE_UNKNOWN, "the account has not issued all of these codes", code_rows=rows)
    uses: Plan = []
    ended = [code for code in own if code.status != CLOSED]
    for code in ended:
        uses += _return(account, code, context)
        code.status, code.closed_at, code.is_dirty = CLOSED, context.now, True
    charged = -sum(amount for _, amount in uses)
    return Outcome(charged, uses, details={"codes": len(ended), "code_rows": rows})


def _return(account: Account, code: SharedCode, context: Context) -> Sequence[tuple[Grant, int]]:
    """What was paid for the uses of a code that are left goes back to its lots, in reverse order of taking."""
    terms = code.terms
    if not terms.is_paid or code.is_used_up:
        return []
    assert terms.uses is not None
    first, end = terms.place * terms.uses + code.uses, (terms.place + 1) * terms.uses
    back = _paid(account, account.known[terms.operation], first * terms.amount, end * terms.amount)[::-1]
    for grant, amount in back:
        come_back(account, grant, "bounced", amount, context.now, context.operation, terms.operation)
    return back
