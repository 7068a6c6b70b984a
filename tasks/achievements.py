"""Achievements: what an account reaches once, for ever, and the credits that come with it. Pure."""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

from creditlane.amounts import MICRO
from creditlane.contract import Message, ReopenAccount, RewardReferral, ThawAccount
from models.rules.burning import new_grant, room_of
from models.rules.catalog import Achievement
from models.rules.state import MAX_OPEN_GRANTS, OPEN, Account, Grant, achieved_at
from tasks.grants import credit
from tasks.operation import Context

ACHIEVEMENT = "achievement"
"""The source of the credits."""

WITH_REFERRALS = RewardReferral, ThawAccount, ReopenAccount
"""The operations that have an account's referrals at hand: what they are the measure of comes with these alone."""


class Reached(NamedTuple):
    """An achievement that an operation brought."""

    name: str
    achievement: Achievement
    lot: Grant | None
    """Its credits, if it comes with any."""


def reach(account: Account, message: Message, context: Context) -> list[Reached]:
    """Note what an account has reached by an operation that was just applied, and give what comes with it.

    The lowest first; each once, whatever is given back later. What an account had reached before the catalog knew of it
    comes with its next operation, of referrals with the next of :data:`WITH_REFERRALS`; so does what an account that is
    full, frozen or closed cannot be given now.
    """
    if account.status != OPEN:
        return []
    goals = [goal for goal in context.catalog.achievements.items() if _is_reached(account, goal[1], message)]
    if not goals:
        return []
    had = achieved_at(account.achieved)
    found: list[Reached] = []
    for name, achievement in sorted(goals, key=lambda goal: (goal[1].at, goal[0])):
        if name not in had and _has_room(account, achievement):
            found.append(Reached(name, achievement, _give(account, achievement, context)))
            had[name] = account.operations + 1  # the number of the operation under way
    if found:
        account.achieved = ",".join(f"{name}:{number}" for name, number in had.items())
        account.is_dirty = True
    return found


def used_micro(account: Account) -> int:
    """What an account has used in all, less what was given back: who consumes and is refunded has used nothing."""
    used: int = account.consumed - account.restored
    return used


def _is_reached(account: Account, achievement: Achievement, message: Message) -> bool:
    if achievement.measure == "used":
        return used_micro(account) >= achievement.at
    referral = account.referral if isinstance(message, WITH_REFERRALS) else None
    return referral is not None and referral.referees * MICRO >= achievement.at


def _has_room(account: Account, achievement: Achievement) -> bool:
    credits = int(achievement.credits)
    return not credits or (credits <= room_of(account) and account.open_grants() < MAX_OPEN_GRANTS)


def _give(account: Account, achievement: Achievement, context: Context) -> Grant | None:
    if not achievement.credits:
        return None
    days = achievement.expires_days
    lot = new_grant(
        account,
        source=ACHIEVEMENT,
        priority=context.catalog.priority_of(ACHIEVEMENT),
        now=context.now,
        operation=context.operation,
        expires_at=None if days is None else context.now + timedelta(days=days),
    )
    credit(account, lot, int(achievement.credits), context)
    return lot
