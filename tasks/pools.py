"""Pools: who may use one, and how much of it in a period (ledger rules: pools).

A member is charged in the pool's own lane, so its limit and the pool's balance are looked at in one place. What names
no member is the pool's own use: it counts for nobody.
"""

from __future__ import annotations

from typing import Any

import msgspec

from creditlane.amounts import format_amount, parse_amount
from creditlane.codes import Code
from creditlane.contract import MemberUse, RemoveMember, SetMember
from models.rules.allowances import (
    Standing,
    count_member,
    give_back_used,
    list_member,
    period_end,
    standing_of,
)
from models.rules.refusal import RefusedError
from models.rules.sharing import MEMBER
from models.rules.state import POOL, Account, Hold
from tasks.operation import Context, Outcome, operation


@operation(SetMember)
def set_member(account: Account, message: SetMember, context: Context) -> Outcome:
    """List a member of a pool, with a ``limit`` in credits for each ``period`` or without; or change what it was.

    Without a limit of its own the catalog's ``member_limit`` and period hold. What the member used in the period under
    way stays when its kind is the same; else the count begins anew with what it holds. Refusals: ``invalid`` for an
    account that is no pool.
    """
    _check_pool(account)
    limit = None if message.limit is None else int(message.limit)
    catalog = context.catalog
    standing = list_member(
        account, message.member, limit, message.period, catalog.pools, context.now, catalog.catalog.zone
    )
    return Outcome(details={"member": message.member, **_limit_of(standing, context)})


@operation(RemoveMember)
def remove_member(account: Account, message: RemoveMember, context: Context) -> Outcome:
    """Take a member off a pool's list: it is charged no more, whoever else may use the pool.

    Its open holds can be captured and released as before, and count. Refusals: ``unknown_member``; ``invalid`` for an
    account that is no pool.
    """
    _check_pool(account)
    allowance = account.allowances.get(MEMBER + message.member)
    if allowance is None or not allowance.is_listed:
        raise RefusedError(Code.UNKNOWN_MEMBER)
    allowance.is_listed = False
    allowance.is_dirty = account.is_dirty = True
    return Outcome(details={"member": message.member})


def _check_pool(account: Account) -> None:
    if account.kind != POOL:
        raise RefusedError(Code.INVALID, "the account is no pool: only those have members")


def _limit_of(standing: Standing, context: Context) -> dict[str, Any]:
    """The limit of a member, and until when its period lasts, as a result tells them."""
    told: dict[str, Any] = {} if standing.limit is None else {"limit": format_amount(standing.limit)}
    ends_at = period_end(standing.period, standing.since, context.catalog.catalog.zone)
    return told if ends_at is None else {**told, "period_end": ends_at}


# --- Charging a member -------------------------------------------------------------------------------


def admitted(account: Account, member: str | None, context: Context) -> Standing | None:
    """How the member stands that is to be charged.

    :returns: None where nothing is counted: for no member, on an account that is no pool, and without any limit.
    :raises RefusedError: ``unknown_member`` for one that was removed, or not listed where it must be.
    """
    if member is None or account.kind != POOL:
        return None
    pools = context.catalog.pools
    if not account.allowances and pools.members == "any" and pools.member_limit is None:
        return None  # as of most pools: this is cheaper
    allowance = account.allowances.get(MEMBER + member)
    listed = None if allowance is None else allowance.is_listed
    if listed is False or (listed is None and pools.members == "listed"):
        raise RefusedError(Code.UNKNOWN_MEMBER)
    return member_standing(account, member, context)


def member_standing(account: Account, member: str | None, context: Context) -> Standing | None:
    """As :func:`admitted`, of one that is at work already: who holds credits may still be charged for them."""
    if member is None or account.kind != POOL:
        return None
    catalog = context.catalog
    return standing_of(account, member, catalog.pools, context.now, catalog.catalog.zone)


def check_limit(standing: Standing, required_micro: int, context: Context) -> None:
    """Refuse what goes over a member's limit, whatever the pool has.

    :raises RefusedError: ``member_limit``, with what was required and what the member has left.
    """
    left = standing.left
    if left is not None and required_micro > left:
        raise RefusedError(Code.MEMBER_LIMIT, **limit_shortage(standing, required_micro, context))


def limit_shortage(standing: Standing, required_micro: int, context: Context) -> dict[str, Any]:
    """The fields of a result that say what a member wanted, and what its limit leaves; amounts in credits."""
    left = standing.left or 0
    return {
        "required": format_amount(required_micro),
        "available": format_amount(left),
        "shortfall": format_amount(required_micro - left),
        "member": standing.member,
        **_limit_of(standing, context),
    }


def want_code(account: Account, member: str | None) -> Code:
    """The refusal for want of credits: of a pool that a member wanted to use, or of an account."""
    return Code.INSUFFICIENT_CREDITS if member is None or account.kind != POOL else Code.POOL_EXHAUSTED


def counted(account: Account, standing: Standing, amount_micro: int, context: Context) -> dict[str, Any]:
    """Count what a member is charged, or what is set aside for it.

    :returns: the field of the result that says so, which a refund reads again; none where nothing is counted.
    """
    if not amount_micro:
        return {}
    return _told(count_member(account, standing, amount_micro), amount_micro, context)


def capture_counted(
    account: Account, standing: Standing, held: Hold, final_micro: int, context: Context
) -> dict[str, Any]:
    """Count what a capture takes above its hold; what it takes less comes back when the hold is closed, after this.

    :param standing: of who holds the credits.
    :param final_micro: what the capture takes in all.
    :returns: as :func:`counted`; what was counted in an earlier period is not part of it.
    """
    extra = max(0, final_micro - held.amount)
    if held.created_at < standing.since and not extra:
        return {}
    after = count_member(account, standing, extra)
    if held.created_at < standing.since:
        return _told(after, extra, context)
    rest = max(0, held.amount - final_micro)
    return _told(after._replace(used=after.used - rest), final_micro, context) if final_micro else {}


def _told(standing: Standing, counted_micro: int, context: Context) -> dict[str, Any]:
    told = {
        "member": standing.member, "period": standing.period, "since": standing.since,
        "counted": format_amount(counted_micro), **_limit_of(standing, context),
    }  # fmt: skip
    if standing.left is not None:
        told["left"] = format_amount(standing.left)
    return {"allowance": told}


class _Charged(msgspec.Struct):
    allowance: MemberUse | None = None


_decode_charged = msgspec.json.Decoder(_Charged).decode


def charged_member(result: bytes | str) -> str | None:
    """Whose limit a charge was counted on, by its stored result."""
    allowance = _decode_charged(result).allowance
    return None if allowance is None else allowance.member


def uncount(account: Account, result: bytes, returned_micro: int, amount_micro: int) -> None:
    """Count that a charge is given back from, if it was counted in the period under way: the last taken comes first.

    :param result: the charge's, as it is stored.
    :param returned_micro: what was given back before, of what was ``amount_micro`` now.
    """
    allowance = _decode_charged(result).allowance
    if allowance is None:
        return
    counted = parse_amount(str(allowance.counted))
    back = min(counted, returned_micro + amount_micro) - min(counted, returned_micro)
    give_back_used(account, allowance.member, back, allowance.period, allowance.since)
