"""Referrals as an account is told of them: its code, its referrer, and those whom it referred."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
from psycopg import Connection

from creditlane.contract import MAX_NAME, rewarding_id
from creditlane.reports import Referee, Referrals
from models.columns import REFERRAL_COLUMNS
from models.reading import DEFAULT_PAGE, MAX_PAGE, account_exists
from models.rules.sharing import Referral, referral_of

OWN = f"SELECT {', '.join(REFERRAL_COLUMNS)} FROM referrals WHERE account = %s"
REFEREES = """
SELECT account, claimed_at, settled_at FROM referrals
WHERE referrer = %(account)s AND (claimed_at, account) < (%(claimed_at)s, %(referee)s)
ORDER BY claimed_at DESC, account DESC LIMIT %(limit)s
"""
REWARDS = """
SELECT operation, code, applied_at, result ->> 'bonus' FROM operations
WHERE account = %s AND operation = ANY(%s::text[])
"""

END = datetime.fromisoformat("9999-12-30T00:00:00+00:00")

MAX_PLACE = MAX_NAME + 40
"""Characters of a place in a list of referees: an instant, and an account."""


def referrals(
    connection: Connection[Any], account: str, *, limit: int = DEFAULT_PAGE, before: str | None = None
) -> Referrals | None:
    """What is known of an account's referrals, with a page of those whom it referred, the latest first.

    :param limit: referees of the page, at most :data:`models.reading.MAX_PAGE`.
    :param before: only earlier ones: ``next_before`` of the page before.
    :returns: None for an account that no operation ever named.
    :raises ValueError: for a limit or a place that is none.
    """
    if not 1 <= limit <= MAX_PAGE:
        raise ValueError(f"a page has 1 to {MAX_PAGE} rows, not {limit}")
    claimed_at, referee = (END, "") if before is None else _place(before)
    referral = own_referral(connection, account)
    if referral is None:
        if not account_exists(connection, account):
            return None
        referral = Referral()
    values = {"account": account, "claimed_at": claimed_at, "referee": referee, "limit": limit + 1}
    rows = connection.execute(REFEREES, values).fetchall()
    ids = {rewarding_id(account, name): name for name, _, _ in rows[:limit]}
    rewards = {
        ids[operation]: reward for operation, *reward in connection.execute(REWARDS, (account, list(ids))).fetchall()
    }
    referees = [_referee(row, rewards.get(row[0])) for row in rows[:limit]]
    last = referees[-1] if len(rows) > limit else None
    return Referrals(
        account=account,
        code=referral.code,
        referrer=referral.referrer,
        claimed_code=referral.claimed_code,
        claimed_at=referral.claimed_at,
        settled_at=referral.settled_at,
        rewarded=referral.referees,
        referees=referees,
        next_before=None if last is None else f"{last.claimed_at.isoformat()} {last.account}",
    )


def own_referral(connection: Connection[Any], account: str) -> Referral | None:
    """By which code an account refers others, and who referred it; None where there is neither."""
    own = connection.execute(OWN, (account,)).fetchone()
    return None if own is None else referral_of(own[1:])


def _referee(row: Sequence[Any], reward: Sequence[Any] | None) -> Referee:
    account, claimed_at, settled_at = row
    code, rewarded_at, bonus = (None, None, None) if reward is None else reward
    status = "settled" if settled_at is not None else "waiting"
    if reward is not None:
        status = code or "rewarded"
    return Referee(
        account=account,
        claimed_at=claimed_at,
        status=status,
        settled_at=settled_at,
        rewarded_at=rewarded_at,
        reward=bonus or "0",
    )


def _place(before: str) -> tuple[datetime, str]:
    at, _, referee = before.partition(" ")
    try:
        return msgspec.convert(at, datetime, strict=False), referee
    except msgspec.ValidationError:
        raise ValueError(f"{before!r} is no place in a list of referees; give next_before of the page before") from None
