"""What transfers and gift codes have in common: what may be given away, and how much in a day (catalog: gifts)."""

from __future__ import annotations

from creditlane.amounts import format_amount
from creditlane.codes import Code
from models.rules.allowances import count, used_in
from models.rules.burning import Plan, plan_burn
from models.rules.refusal import RefusedError
from models.rules.sharing import GIVEN
from models.rules.state import Account
from tasks.consuming import insufficient, shortage
from tasks.operation import Context, Need

GIFT_NEED = Need("allowance", GIVEN)
"""What an operation needs that calls the functions below."""


def plan_gift(account: Account, amount_micro: int, context: Context) -> Plan:
    """Choose what is given away: unscoped lots of sources that the catalog lets go, in burn-down order.

    :raises RefusedError: ``insufficient_credits``; ``not_transferable`` when there are enough, but not of such lots.
    """
    plan, missing = plan_burn(account, amount_micro, None, context.now, context.catalog.is_transferable)
    if missing:
        short = plan_burn(account, amount_micro, None, context.now)[1]
        if short:
            raise insufficient(account, context, amount_micro, short)
        raise RefusedError(Code.NOT_TRANSFERABLE, **shortage(account, context, amount_micro, missing))
    return plan


def check_gift(account: Account, amount_micro: int, context: Context, gifts_made: int = 1) -> None:
    """Refuse what goes over the day's limits; to be called before anything is written.

    :param amount_micro: what is to be given away.
    :param gifts_made: how many gifts it is: each use of a code is one.
    :raises RefusedError: ``daily_limit``.
    """
    gifts, zone = context.catalog.gifts, context.catalog.catalog.zone
    given, times = used_in(account, GIVEN, "day", context.now, zone)
    if gifts.gifts_per_day is not None and times + gifts_made > gifts.gifts_per_day:
        raise RefusedError(Code.DAILY_LIMIT, f"an account may give {gifts.gifts_per_day} times a day")
    if gifts.credits_per_day is not None and given + amount_micro > gifts.credits_per_day:
        left = format_amount(max(0, gifts.credits_per_day - given))
        raise RefusedError(Code.DAILY_LIMIT, f"of what an account may give in a day {left} credits are left")


def count_gift(account: Account, amount_micro: int, context: Context, gifts_made: int = 1) -> None:
    """Count what was given away; nothing is kept where the catalog has no limit."""
    gifts = context.catalog.gifts
    if gifts.gifts_per_day is not None or gifts.credits_per_day is not None:
        given = count(account, GIVEN, "day", amount_micro, context.now, context.catalog.catalog.zone)
        given.uses += gifts_made - 1
