"""The second ledger with pools: what members may use, written once more, slow and obvious.

Nothing is counted up: each use is a mark with its instant, and what a member used in a period is the sum of the marks
that lie in it. What comes back makes its own mark smaller, so it never matters which period is under way.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from tests.oracle.model import Refusal, Row
from tests.oracle.plans import DAY, PlanLedger, instant_of

EVER = datetime(1970, 1, 1, tzinfo=UTC)


class PoolLedger(PlanLedger):
    """One account; a pool, if it was opened as one."""

    def __init__(self, policy: Row) -> None:
        super().__init__(policy)
        self.kind = "user"
        self.members: dict[str, Row] = {}
        self.marks: dict[str, list[Row]] = {}

    def open_(self, said: Row, operation: str, now: datetime) -> Row:
        details = super().open_(said, operation, now)
        self.kind = said.get("kind", "user")
        return details

    # The list.

    def set_member_(self, said: Row, operation: str, now: datetime) -> Row:
        self.must_be_a_pool()
        limit = said.get("limit")
        member = self.members.setdefault(said["member"], {"counts": None, "period": "month", "marks": []})
        member.update(listed=True, limit=limit, period=said.get("period", "month"))
        self.count(said["member"])
        return {"member": said["member"], **self.terms(said["member"], now)}

    def remove_member_(self, said: Row, operation: str, now: datetime) -> Row:
        self.must_be_a_pool()
        if self.members.get(said["member"], {}).get("listed") is not True:
            raise Refusal("unknown_member")
        self.members[said["member"]]["listed"] = False
        return {"member": said["member"]}

    def must_be_a_pool(self) -> None:
        if self.kind != "pool":
            raise Refusal("invalid")

    # Charges.

    def consume_(self, said: Row, operation: str, now: datetime) -> Row:
        who = said.get("member")
        if who is None or self.kind != "pool":
            return super().consume_(said, operation, now)
        cost = self.cost(said)
        self.let_in(who)
        left, there = self.left(who, now), self.spendable(said.get("feature"), now)
        allowed = cost if left is None else min(cost, left)
        charged = min(allowed, there) if said.get("partial") else cost
        if charged > allowed or (cost and not allowed):
            raise self.over_the_limit(who, cost, now)
        if charged > there or (cost and not charged):
            raise Refusal("pool_exhausted", **self.shortage(cost, min(there, charged)).details)
        takings = self.find(charged, said.get("feature"), now)
        for lot, taken in takings:
            self.move("consumed", lot, taken, now, operation)
        self.charges[operation] = [{"lot": lot, "taken": taken, "back": 0} for lot, taken in takings]
        details: Row = {"charged": charged, "uses": [(lot["number"], taken) for lot, taken in takings]}
        if there < allowed:
            details.update(self.shortage(cost, charged).details)
        elif charged < cost:
            details.update(self.over_the_limit(who, cost, now).details)
        self.marks[operation] = [self.mark(who, charged, now)]
        return {**details, **self.standing(who, self.marks[operation], now)}

    def hold_(self, said: Row, operation: str, now: datetime) -> Row:
        who = said.get("member") if self.kind == "pool" else None
        cost = self.cost(said)
        if who is not None:
            self.let_in(who)
            self.within_the_limit(who, cost, now)
        details = self.as_a_pool(who, lambda: super(PoolLedger, self).hold_(said, operation, now))
        hold = self.holds[operation]
        hold["member"] = who
        if who is None:
            return details
        self.mark(who, cost, now, hold)
        return {**details, **self.standing(who, [hold["mark"]], now)}

    def capture_(self, said: Row, operation: str, now: datetime) -> Row:
        hold = self.open_hold(said["hold"])
        who = hold["member"]
        final = self.final(hold, said)
        if who is not None:
            self.within_the_limit(who, max(0, final - hold["amount"]), now)
            if self.limit_of(who) is not None:
                self.members.setdefault(who, {"listed": None, "limit": None, "counts": None, "marks": []})
                self.count(who)
        details = self.as_a_pool(who, lambda: super(PoolLedger, self).capture_(said, operation, now))
        if who is None:
            return details
        own = [hold["mark"]]
        if final > hold["amount"]:
            own.append(self.mark(who, final - hold["amount"], now))
        self.marks[operation] = own
        return {**details, **self.standing(who, own, now)}

    def refund_(self, said: Row, operation: str, now: datetime) -> Row:
        details = super().refund_(said, operation, now)
        back = -details["charged"]
        for mark in reversed(self.marks.get(said["operation"], [])):
            part = min(back, mark["amount"])
            mark["amount"] -= part
            back -= part
        return details

    def unhold(self, hold: Row, amount: int, at: datetime, now: datetime, operation: str | None) -> None:
        super().unhold(hold, amount, at, now, operation)
        if hold["member"] is not None:
            hold["mark"]["amount"] -= amount

    # What they share.

    def as_a_pool(self, who: str | None, step: Any) -> Row:
        """What fails for want of credits says so of the pool, where a member wanted them."""
        try:
            details: Row = step()
        except Refusal as refusal:
            if who is not None and refusal.code == "insufficient_credits":
                raise Refusal("pool_exhausted", **refusal.details) from None
            raise
        return details

    def let_in(self, who: str) -> None:
        listed = self.members.get(who, {}).get("listed")
        if listed is False or (listed is None and self.policy["pools"]["members"] == "listed"):
            raise Refusal("unknown_member")

    def within_the_limit(self, who: str, cost: int, now: datetime) -> None:
        left = self.left(who, now)
        if left is not None and cost > left:
            raise self.over_the_limit(who, cost, now)

    def over_the_limit(self, who: str, cost: int, now: datetime) -> Refusal:
        left = self.left(who, now) or 0
        details = {"required": cost, "available": left, "shortfall": cost - left, "member": who}
        return Refusal("member_limit", **details, **self.terms(who, now))

    def limit_of(self, who: str) -> int | None:
        own = self.members.get(who, {}).get("limit")
        limit: int | None = self.policy["pools"]["limit"] if own is None else own
        return limit

    def period_of(self, who: str) -> str:
        """By which kind of period a member is counted: that of the limit that holds."""
        member = self.members.get(who)
        if member is None or (member["limit"] is None and self.policy["pools"]["limit"] is not None):
            return str(self.policy["pools"]["period"])
        return str(member["period"])

    def count(self, who: str) -> None:
        """Begin to count, by another kind of period as well: with what is held, and nothing else."""
        member = self.members[who]
        if member["counts"] != self.period_of(who):
            member["counts"] = self.period_of(who)
            member["marks"] = [hold["mark"] for hold in self.holds.values() if hold["open"] and hold["member"] == who]

    def mark(self, who: str, amount: int, now: datetime, hold: Row | None = None) -> Row:
        """A use, of a hold if there is one; counted, if the member is."""
        mark: Row = {"amount": amount, "at": now}
        if hold is not None:
            hold["mark"] = mark
        if amount and self.policy["pools"]["limit"] is not None and who not in self.members:
            self.members[who] = {"listed": None, "limit": None, "counts": None, "marks": []}
            self.count(who)
        if who in self.members and not any(each is mark for each in self.members[who]["marks"]):
            self.members[who]["marks"].append(mark)
        return mark

    def used(self, who: str, now: datetime) -> int:
        start = self.start(self.period_of(who), now)
        if who in self.members:
            marks = self.members[who]["marks"]
        else:
            marks = [hold["mark"] for hold in self.holds.values() if hold["open"] and hold["member"] == who]
        return int(sum(mark["amount"] for mark in marks if mark["at"] >= start))

    def left(self, who: str, now: datetime) -> int | None:
        limit = self.limit_of(who)
        return None if limit is None else max(0, limit - self.used(who, now))

    def terms(self, who: str, now: datetime) -> Row:
        """The limit, and when the next period begins."""
        told: Row = {}
        if self.limit_of(who) is not None:
            told["limit"] = self.limit_of(who)
        period = self.period_of(who)
        if period != "total":
            told["period_end"] = self.end(period, now)
        return told

    def standing(self, who: str, own: list[Row], now: datetime) -> Row:
        """What an answer says of a member that is counted: what of the operation is of the period under way."""
        start = self.start(self.period_of(who), now)
        amount = sum(mark["amount"] for mark in own if mark["at"] >= start)
        if who not in self.members or not amount:
            return {}
        left = self.left(who, now)
        told = {"member": who, "period": self.period_of(who), "since": start, "counted": amount}
        return {"allowance": {**told, **self.terms(who, now), **({} if left is None else {"left": left})}}

    def start(self, period: str, now: datetime) -> datetime:
        """Midnight of the last first day of a period that is over."""
        if period == "total":
            return EVER
        day = now.astimezone(ZoneInfo(self.policy["zone"])).date()
        while not begins(period, day):
            day -= timedelta(days=1)
        return instant_of(datetime.combine(day, time()), self.policy["zone"])

    def end(self, period: str, now: datetime) -> datetime:
        """Midnight of the next first day."""
        day = now.astimezone(ZoneInfo(self.policy["zone"])).date() + DAY
        while not begins(period, day):
            day += timedelta(days=1)
        return instant_of(datetime.combine(day, time()), self.policy["zone"])


def begins(period: str, day: date) -> bool:
    """Whether a period begins with this day."""
    return period == "day" or (period == "week" and day.isoweekday() == 1) or (period == "month" and day.day == 1)
