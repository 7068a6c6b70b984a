"""The second ledger with plans: what the design says of subscriptions, written once more, slow and obvious.

A plan is the catalog's own words for it, a plain dict; a subscription is one dict too. Months are counted by going from
one first of the month to the next; the day is looked for from the anchor's own downwards.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from fractions import Fraction
from functools import lru_cache
from typing import Any
from zoneinfo import ZoneInfo

from tests.oracle.model import Ledger, Refusal, Row, in_burn_down_order

HALF = timedelta(days=15)
"""How much longer than a month a period may be that one payment is for."""

DAY = timedelta(days=1)
TICK = timedelta(microseconds=1)
NO_PRICE = {"minor": None, "currency": None, "per": None}


@lru_cache(maxsize=100_000)
def later(anchor: datetime, months: int, zone: str) -> datetime:
    """The same day and time of day so many months on, as a clock on a wall of that zone shows it."""
    if months == 0:
        return anchor.astimezone(UTC)
    here = anchor.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
    first = date(here.year, here.month, 1)
    for _ in range(months):
        month = first.month
        while first.month == month:
            first += DAY
    last = here.day
    while True:
        try:
            day = date(first.year, first.month, last)
            break
        except ValueError:
            last -= 1
    return instant_of(datetime.combine(day, here.time()), zone)


def instant_of(wall: datetime, zone: str) -> datetime:
    """When a clock on the wall shows this: the first time it does; if it never does, as much later as it is put on."""
    tz = ZoneInfo(zone)
    as_utc = wall.replace(tzinfo=UTC)
    offsets = {tz.utcoffset((as_utc + timedelta(hours=hours)).astimezone(tz)) for hours in range(-36, 37)}
    shown = [
        as_utc - offset
        for offset in offsets
        if offset is not None and (as_utc - offset).astimezone(tz).replace(tzinfo=None) == wall
    ]
    if shown:
        return min(shown)
    before = tz.utcoffset((as_utc - timedelta(hours=36)).astimezone(tz))
    assert before is not None
    return as_utc - before


def first_of_month(now: datetime, zone: str) -> datetime:
    """When the month began that it is in a zone."""
    here = now.astimezone(ZoneInfo(zone))
    return instant_of(datetime.combine(here.date().replace(day=1), time()), zone)


def share(text: str, monthly: int) -> int:
    """Micro-credits of a cap: a share of the monthly credits, or credits."""
    if text.endswith("%"):
        return int(Fraction(text[:-1]) * monthly / 100)
    if text.endswith("x"):
        return int(Fraction(text[:-1]) * monthly)
    return int(Fraction(text) * 1_000_000)


def height(plan: Row) -> tuple[bool, int]:
    """What makes a plan higher than another."""
    return plan["unlimited"], plan["credits"]


class PlanLedger(Ledger):
    """One account that may have a plan.

    :param policy: as of the ledger without plans, and ``zone``, ``plans`` (by name: ``name``, ``credits`` a month,
        ``unlimited``, ``mode``, ``source``, ``rollover_source``, ``rollover_cap``, ``balance_cap``,
        ``rollover_months``, ``price`` as a dict of minor units and currency or None, ``interval``, ``anchor``,
        ``zone``, ``grace_days``, ``upgrade``, and ``offer``, its price as text).
    """

    def __init__(self, policy: Row) -> None:
        super().__init__(policy)
        self.plan: Row | None = None

    # The operations.

    def open_(self, said: Row, operation: str, now: datetime) -> Row:
        if self.opened:
            raise Refusal("account_exists")
        if "plan" in said and said["plan"] not in self.policy["plans"]:
            raise Refusal("unknown_plan")
        details = super().open_(said, operation, now)
        if "plan" in said:
            details.update(self.begin(self.known_plan(said["plan"]), {}, operation, now))
        return details

    def subscribe_(self, said: Row, operation: str, now: datetime) -> Row:
        wanted = self.known_plan(said["plan"])
        if self.plan is not None and self.plan["alive"]:
            if self.plan["is"]["name"] == said["plan"] and self.plan["cancels"]:
                start = said.get("period_start", now)
                until = said.get("period_end") or self.paid_from(start, self.months_of(wanted))
                told = "period_start" in said or "period_end" in said
                if wanted["price"] is not None and told and not self.is_paid(until, said):
                    return self.go_on(wanted, start, until, said, now, operation)
                self.plan["cancels"] = False
                if wanted["price"] is not None and said.get("payment") not in (None, self.plan["payment"]):
                    start = said.get("period_start", now)
                    until = said.get("period_end") or self.paid_from(start, self.months_of(wanted))
                    if self.plan["paid_until"] is None or until - self.plan["paid_until"] > DAY:
                        return self.pay(wanted, start, until, said, now, operation)
                return self.state()
            raise Refusal("already_subscribed")
        return self.begin(wanted, said, operation, now)

    def begin(self, wanted: Row, said: Row, operation: str, now: datetime) -> Row:
        start = said.get("period_start", now)
        if start > now + DAY:
            raise Refusal("invalid")
        if said.get("period_end", start + TICK) <= start:
            raise Refusal("invalid")
        before = self.plan
        if before is not None and said.get("payment") is not None and said["payment"] == before["payment"]:
            raise Refusal("already_renewed")
        zone = wanted["zone"] or self.policy["zone"]
        told_when = wanted["price"] is not None and "period_start" in said
        anchor = first_of_month(start, zone) if wanted["anchor"] == "month" and not told_when else start
        paid_until = None
        if wanted["price"] is not None:
            paid_until = said.get("period_end") or later(anchor, self.months_of(wanted), zone)
        given = 0
        if wanted["price"] is None and before is not None and now < before["end"]:
            anchor, zone, months, given = before["anchor"], before["zone"], before["months"], before["most"]
            begins, ends = before["start"], before["end"]
        else:
            last = now if paid_until is None else min(now, paid_until - TICK)
            months = 0
            while later(anchor, months + 1, zone) <= last:
                months += 1
            begins, ends = later(anchor, months, zone), later(anchor, months + 1, zone)
        if paid_until is not None and paid_until - begins > DAY and paid_until - ends <= HALF:
            ends = paid_until
        self.plan = {
            "is": wanted,
            "next": None,
            "next_from": None,
            "anchor": anchor,
            "zone": zone,
            "months": months,
            "start": begins,
            "end": ends,
            "paid_until": paid_until,
            "payment": None,
            "price": NO_PRICE,
            "alive": True,
            "cancels": False,
            "most": max(given, wanted["credits"]),
            "lots": [],
            "last": None,
        }
        self.remember_payment(said)
        return self.state(allotted=self.allot(wanted["credits"] - given, now, now, operation))

    def change_(self, said: Row, operation: str, now: datetime) -> Row:
        wanted = self.known_plan(said["plan"])
        plan = self.running()
        plan["cancels"] = False
        plan["next"] = None
        if wanted["name"] == plan["is"]["name"]:
            return self.state()
        if height(wanted) < height(plan["is"]):
            sooner = said.get("period_end") if "payment" in said else None
            if sooner is not None and plan["paid_until"] is not None and plan["paid_until"] - sooner > DAY:
                plan["paid_until"] = sooner
            plan["next"] = wanted
            plan["next_from"] = plan["paid_until"] or plan["end"]
            return self.state(allotted=self.renew_what_is_overdue(now, operation))
        start, until = said.get("period_start"), said.get("period_end")
        so_far = self.months_of(plan["is"]) if plan["is"]["price"] is not None else 0
        if until is None and "payment" in said and wanted["price"] is not None and self.months_of(wanted) > so_far:
            start = start or now
            until = self.paid_from(start, self.months_of(wanted))
        outlasts = until is not None and until - plan["end"] > DAY
        if wanted["price"] is not None and outlasts and start is not None and self.amidst(start):
            assert until is not None
            return self.pay(wanted, start, until, said, now, operation)
        left = max(timedelta(0), plan["end"] - now)
        plan["is"] = wanted
        if wanted["price"] is None:
            plan["paid_until"] = None
        elif until is not None:
            plan["paid_until"] = until
        elif plan["paid_until"] is None:
            plan["paid_until"] = plan["end"]
        self.remember_payment(said)
        more, expired = max(0, wanted["credits"] - plan["most"]), 0
        if wanted["upgrade"] == "prorated":
            more = int(more * Fraction(left // TICK, (plan["end"] - plan["start"]) // TICK))
        elif left == timedelta(0):
            more = 0
        elif wanted["upgrade"] == "full" and more > 0:
            more = wanted["credits"]
            expired = self.lapse(now, now, operation)
        plan["most"] = max(plan["most"], wanted["credits"])
        allotted = self.allot(more, now, now, operation)
        return self.state(allotted=allotted + self.renew_what_is_overdue(now, operation), expired=expired)

    def cancel_(self, said: Row, operation: str, now: datetime) -> Row:
        plan = self.running()
        if said.get("at") == "now" or plan["end"] <= now:
            return self.state(expired=self.finish(now, now, operation))
        plan["cancels"] = True
        plan["next"] = None
        return self.state()

    def renew_(self, said: Row, operation: str, now: datetime) -> Row:
        plan = self.plan
        start = said["period_start"]
        if plan is None:
            if "plan" not in said:
                raise Refusal("no_subscription")
            wanted = self.known_plan(said["plan"])
            if wanted["price"] is None:
                raise Refusal("invalid")
            return self.begin(wanted, said, operation, now)
        wanted = self.known_plan(said["plan"]) if "plan" in said else self.comes_next(start)
        if "plan" not in said and wanted["price"] is None:
            wanted = plan["is"]
        if not plan["alive"]:
            wanted = self.known_plan(wanted["name"])
        if wanted["price"] is None:
            raise Refusal("invalid")
        until = said.get("period_end") or self.paid_from(start, self.months_of(wanted))
        if self.is_paid(until, said):
            raise Refusal("already_renewed")
        if not plan["alive"]:
            return self.begin(wanted, said, operation, now)
        return self.go_on(wanted, start, until, said, now, operation)

    def paid_from(self, start: datetime, months: int) -> datetime:
        """So many months on, by the plan's own dates where it begins at one of them."""
        plan = self.plan
        assert plan is not None
        ours = 0
        while later(plan["anchor"], ours, plan["zone"]) < start - DAY:
            ours += 1
        if later(plan["anchor"], ours, plan["zone"]) <= start + DAY:
            return later(plan["anchor"], ours + months, plan["zone"])
        return later(start, months, plan["zone"])

    def is_paid(self, until: datetime, said: Row) -> bool:
        assert self.plan is not None
        paid_until = self.plan["paid_until"]
        if paid_until is None:
            return False
        if not self.plan["alive"] and "payment" in said and self.plan["ended"] < paid_until:
            paid_until = self.plan["ended"]
        return bool(until <= paid_until + DAY)

    def go_on(self, wanted: Row, start: datetime, until: datetime, said: Row, now: datetime, operation: str) -> Row:
        plan = self.running()
        if plan["paid_until"] is None and until <= now:
            raise Refusal("invalid")
        if self.leaves_a_gap(start) and start - now > DAY:
            raise Refusal("invalid")
        plan["cancels"] = False
        return self.pay(wanted, start, until, said, now, operation)

    def pay(self, wanted: Row, start: datetime, until: datetime, said: Row, now: datetime, operation: str) -> Row:
        """What is paid for begins where what was paid for ends, or at a beginning of its own."""
        plan = self.running()
        if self.amidst(start) or self.leaves_a_gap(start):
            plan["end"] = start
        elif plan["is"]["price"] is None and start - plan["start"] <= DAY:
            plan["end"] = max(start, plan["start"] + TICK)
        if wanted["name"] == plan["is"]["name"]:
            if plan["next"] is not None:
                plan["next_from"] = max(plan["next_from"], until)
        elif wanted["name"] != self.comes_next(start)["name"]:
            plan["next"], plan["next_from"] = wanted, start
        plan["paid_until"] = until
        self.remember_payment(said)
        return self.state(allotted=self.renew_what_is_overdue(now, operation))

    def leaves_a_gap(self, start: datetime) -> bool:
        plan = self.running()
        paid_so_far = plan["end"] if plan["paid_until"] is None else max(plan["end"], plan["paid_until"])
        return bool(start - plan["end"] > DAY and paid_so_far - plan["end"] <= DAY)

    def amidst(self, start: datetime) -> bool:
        plan = self.running()
        return bool(start - plan["start"] > DAY and plan["end"] - start > DAY)

    def undo_(self, said: Row, operation: str, now: datetime) -> Row:
        plan = self.running()
        last = plan["last"]
        if last is None or last["undone"]:
            raise Refusal("nothing_to_undo")
        last["undone"] = True
        revoked = sum(lot["revoked"] for lot in self.lots)
        details: Row = {}
        given = [lot for lot in last["made"] if lot["origin"] is None]
        carried = [lot for lot in last["made"] if lot["origin"] is not None]
        for lot in given:
            wanted = max(0, lot["granted"] + lot["received"] - lot["expired"] - lot["clawed_back"])
            here = min(lot["available"], wanted)
            if here:
                self.move("revoked", lot, here, now, operation)
            lot["clawed_back"] += wanted
            if wanted > here:
                if self.policy["on_spent"] == "forgive":
                    lot["forgiven"] += wanted - here
                    details["forgiven"] = wanted - here
                else:
                    self.move("debt_incurred", lot, wanted - here, now, operation)
                    details["owed"] = wanted - here
        details["taken_back"] = sum(lot["revoked"] for lot in self.lots) - revoked
        for lot in carried:
            back = lot["available"]
            if back:
                home = self.home_for(lot, operation, now)
                self.move("rolled_out", lot, back, now, operation)
                self.move("rolled_in", home, back, now, operation)
                self.take_what_is_owed(home, back, now, now, operation)
        details["restored"] = 0
        for lot, expired in last["expired"]:
            details["restored"] += expired
            home = self.home_for(lot, operation, now)
            self.move("unexpired", lot, expired, now, operation)
            self.move("rolled_out", lot, expired, now, operation)
            self.move("rolled_in", home, expired, now, operation)
            self.bring_to_its_share(home["purchase"], operation, now, now)
            self.take_what_is_owed(home, home["available"], now, now, operation)
        return {**self.state(), **details}

    def home_for(self, lot: Row, operation: str, now: datetime) -> Row:
        """A lot of the period under way for what a lot of an ended one had."""
        plan = self.running()
        end = None if plan["is"]["mode"] == "accumulate" else self.grace_ends()
        home = self.add_lot(operation, now, plan["is"]["source"], None, lot["scope"], now, end, lot["purchase"])
        home["price"] = lot["price"]
        home["origin"] = self.root_of(lot)["number"]
        if end is not None:
            plan["lots"].append(home)
        return home

    # Time.

    def settle(self, now: datetime) -> None:
        """What is due of holds, of lots and of the plan, the first of it first."""
        while True:
            due: list[tuple[datetime, int, Any, Row]] = []
            due += [(h["end"], 0, h["id"], h) for h in self.holds.values() if h["open"] and h["end"] <= now]
            turn = self.turn()
            for lot in self.lots:
                if not lot["available"] or lot["end"] is None or lot["end"] > now:
                    continue
                ours = self.plan is not None and any(each is lot for each in self.plan["lots"])
                if not (ours and turn is not None and turn <= lot["end"]):
                    due.append((lot["end"], 1, lot["number"], lot))
            if turn is not None and turn <= now:
                assert self.plan is not None
                due.append((turn, 2, 0, self.plan))
            if not due:
                return
            instant, rank, _, what = min(due, key=lambda item: item[:3])
            if rank == 0:
                self.unhold(what, what["amount"], instant, now, None)
                what["open"] = False
            elif rank == 1:
                self.move("expired", what, what["available"], now, None, None, instant)
            elif self.goes_on():
                self.next_period(instant, now, None)
            else:
                self.finish(instant, now, None)

    def goes_on(self) -> bool:
        """Whether the next period comes with the calendar."""
        plan = self.plan
        assert plan is not None
        # A payment that reaches a day or less into the next period does not pay for it.
        if plan["paid_until"] is not None and plan["paid_until"] - plan["end"] > DAY:
            return True
        return not plan["cancels"] and self.comes_next()["price"] is None

    def comes_next(self, start: datetime | None = None) -> Row:
        """The plan of the next period, or of one that begins then: what was paid for is given to its end first."""
        plan = self.plan
        assert plan is not None
        found: Row = plan["is"]
        if plan["next"] is not None and plan["next_from"] - (start or plan["end"]) <= DAY:
            found = plan["next"]
        return found

    def turn(self) -> datetime | None:
        """When time alone changes the plan."""
        plan = self.plan
        if plan is None or not plan["alive"]:
            return None
        end: datetime = plan["end"]
        return end if plan["cancels"] or self.goes_on() else self.grace_ends()

    def grace_ends(self) -> datetime:
        plan = self.plan
        assert plan is not None
        end: datetime = plan["end"] + timedelta(days=plan["is"]["grace_days"] if plan["is"]["price"] else 0)
        return end

    def renew_what_is_overdue(self, now: datetime, operation: str) -> int:
        """A payment, or a change, makes periods due that are over: they begin now, each in its order."""
        allotted = 0
        while self.goes_on() and self.running()["end"] <= now:
            allotted += self.next_period(now, now, operation)
        return allotted

    def next_period(self, at: datetime, now: datetime, operation: str | None) -> int:
        plan = self.running()
        over = plan["is"]
        wanted = self.comes_next()
        plan["is"] = self.policy["plans"].get(wanted["name"], wanted)
        if wanted is plan["next"]:
            plan["next"] = None
        if plan["is"]["price"] is None:
            plan["paid_until"], plan["payment"], plan["price"] = None, None, NO_PRICE
        plan["months"] += 1
        planned = later(plan["anchor"], plan["months"], plan["zone"])
        if not -DAY <= planned - plan["end"] <= DAY:
            plan["anchor"], plan["months"] = plan["end"], 0
        plan["start"] = plan["end"]
        plan["end"] = later(plan["anchor"], plan["months"] + 1, plan["zone"])
        paid = plan["paid_until"]
        if paid is not None and paid - plan["start"] > DAY and paid - plan["end"] <= HALF:
            plan["end"] = paid
        touched = [lot for lot in plan["lots"] if lot["available"] or lot["held"] or lot["in_transit"]]
        known = len(self.lots)
        expired: list[tuple[Row, int]] = []
        left = [lot for lot in in_burn_down_order(plan["lots"]) if lot["available"]]
        if over["mode"] == "rollover":
            end = None
            if over["rollover_months"] is not None:
                end = later(plan["anchor"], plan["months"] + over["rollover_months"], plan["zone"])
            most = share(over["rollover_cap"] or over["balance_cap"], over["credits"])
            if over["balance_cap"] is not None:
                most = max(0, most - plan["is"]["credits"])
            old = [
                lot
                for lot in self.lots
                if lot["source"] == over["rollover_source"]
                and (lot["end"] is None or lot["end"] > at)
                and not self.among(lot, plan["lots"])
            ]
            for lot in left if end is not None and end <= at else []:
                expired.append((lot, lot["available"]))
                self.move("expired", lot, lot["available"], now, operation, None, at)
            left = [lot for lot in left if lot["available"]]
            queue = [(lot["end"], 0, lot["born"], lot["number"], lot) for lot in old]
            queue += [(end, 1, at, place, lot) for place, lot in enumerate(left)]
            queue.sort(key=lambda one: (one[0] is None, one[0] or at, *one[1:4]))
            set_aside = sum(lot["held"] + lot["in_transit"] for lot in old)
            excess = max(0, sum(one[4]["available"] for one in queue) + set_aside - most)
            for *_, lot in queue:
                lapses = min(excess, lot["available"])
                excess -= lapses
                if lapses:
                    self.move("expired", lot, lapses, now, operation, None, at)
                    expired.append((lot, lapses))
                if self.among(lot, left) and lot["available"]:
                    self.carry(lot, over, end, at, now, operation)
        else:
            for lot in left:
                expired.append((lot, lot["available"]))
                self.move("expired", lot, lot["available"], now, operation, None, at)
        self.end_early(touched, at)
        plan["most"] = plan["is"]["credits"]
        plan["lots"] = []
        allotted = self.allot(plan["most"], at, now, operation)
        plan["last"] = {"made": self.lots[known:], "expired": expired, "undone": False}
        return allotted

    def carry(self, lot: Row, over: Row, end: datetime | None, at: datetime, now: datetime, who: str | None) -> None:
        """Credits of an ended period into a lot of their own."""
        amount = lot["available"]
        name = who or f"renewal:{at.isoformat()}"
        onward = self.add_lot(name, at, over["rollover_source"], None, lot["scope"], at, end, lot["purchase"])
        onward["price"] = lot["price"]
        onward["origin"] = self.root_of(lot)["number"]
        self.move("rolled_out", lot, amount, now, who, None, at)
        self.move("rolled_in", onward, amount, now, who, None, at)

    def allot(self, amount: int, at: datetime, now: datetime, operation: str | None) -> int:
        plan = self.running()
        end = None if plan["is"]["mode"] == "accumulate" else self.grace_ends()
        if amount <= 0 or (end is not None and end <= at):
            return 0
        name = operation or f"renewal:{at.isoformat()}"
        lot = self.add_lot(name, at, plan["is"]["source"], None, None, at, end, plan["payment"])
        lot["price"] = plan["price"]
        if end is not None:
            plan["lots"].append(lot)
        self.move("granted", lot, amount, now, operation, None, at)
        self.bring_to_its_share(lot["purchase"], operation, at, now)
        self.take_what_is_owed(lot, lot["available"], at, now, operation)
        return amount

    def finish(self, at: datetime, now: datetime, operation: str | None) -> int:
        """The plan is over, and what is left of its period's credits."""
        plan = self.running()
        expired = self.lapse(at, now, operation)
        plan.update(alive=False, lots=[], next=None, cancels=False, ended=at)
        return expired

    def lapse(self, at: datetime, now: datetime, operation: str | None) -> int:
        """The period's credits end here and now, what is set aside of them too when it comes back."""
        plan = self.running()
        touched = [lot for lot in plan["lots"] if lot["available"] or lot["held"] or lot["in_transit"]]
        expired = 0
        for lot in in_burn_down_order(touched):
            if lot["available"]:
                expired += lot["available"]
                self.move("expired", lot, lot["available"], now, operation, None, at)
        self.end_early(touched, at)
        plan["lots"] = []
        return expired

    def end_early(self, lots: list[Row], at: datetime) -> None:
        for lot in lots:
            lot["end"] = min(lot["end"], at)

    # What the operations share.

    def among(self, lot: Row, lots: list[Row]) -> bool:
        return any(each is lot for each in lots)

    def months_of(self, plan: Row) -> int:
        return 12 if plan["interval"] == "year" else 1

    def known_plan(self, name: str) -> Row:
        if name not in self.policy["plans"]:
            raise Refusal("unknown_plan")
        found: Row = self.policy["plans"][name]
        return found

    def running(self) -> Row:
        if self.plan is None or not self.plan["alive"]:
            raise Refusal("no_subscription")
        return self.plan

    def remember_payment(self, said: Row) -> None:
        """Who paid, and how much a credit: for the lots to come."""
        plan = self.running()
        wanted = self.comes_next()
        if wanted["price"] is None:
            plan["payment"], plan["price"] = None, NO_PRICE
            return
        plan["payment"] = said.get("payment", plan["payment"])
        plan["price"] = said.get("unit_price") or {
            **wanted["price"],
            "per": wanted["credits"] * self.months_of(wanted) or None,
        }

    def state(self, allotted: int = 0, expired: int = 0) -> Row:
        plan = self.plan
        assert plan is not None
        status = "cancelled" if plan["cancels"] else "active" if plan["alive"] else "ended"
        said: Row = {
            "plan": plan["is"]["name"],
            "plan_status": status,
            "period_start": plan["start"],
            "period_end": plan["end"],
        }
        if plan["next"] is not None:
            said["plan_next"] = plan["next"]["name"]
        if plan["paid_until"] is not None:
            said["paid_until"] = plan["paid_until"]
        if allotted:
            said["allotted"] = allotted
        if expired:
            said["expired"] = expired
        return said

    def is_free_of_charge(self) -> bool:
        return self.plan is not None and self.plan["alive"] and bool(self.plan["is"]["unlimited"])

    def cost(self, said: Row) -> int:
        cost = super().cost(said)
        return 0 if self.is_free_of_charge() else cost

    def final(self, hold: Row, said: Row) -> int:
        final = super().final(hold, said)
        return min(final, 0 if "quantity" in said else hold["amount"]) if self.is_free_of_charge() else final

    def offers(self, shortfall: int) -> list[Row]:
        """Packs, and plans that are higher than the present one, that cover so much."""
        alive = self.plan is not None and self.plan["alive"]
        present = height(self.plan["is"]) if alive and self.plan is not None else (False, 0)
        plans = [
            {"name": plan["name"], "minor": plan["price"]["minor"], "credits": plan["credits"]}
            | ({"credits": 10**18} if plan["unlimited"] else {})
            for plan in self.policy["plans"].values()
            if plan["price"] is not None and height(plan) > present and height(plan) >= (False, shortfall)
        ]
        return super().offers(shortfall) + plans

    def due(self) -> datetime | None:
        found = [each for each in (super().due(), self.turn()) if each is not None]
        return min(found, default=None)
