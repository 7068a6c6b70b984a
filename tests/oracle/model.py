"""A second ledger, slow and obvious, to check the first one against.

Written from the design document alone and sharing no code with the rules: amounts come out of fractions,
the paying grant is found by comparing every pair, what is due is found by looking at everything again.
One lot of credits is one dict, one movement of credits is one dict. It trusts its messages to be valid:
the door checks those.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from fractions import Fraction
from hashlib import sha256
from math import ceil
from typing import Any

Row = dict[str, Any]
"""A lot, a hold, a movement or an answer."""

INSTANTS = ("effective_at", "expires_at", "occurred_at", "period_start", "period_end")
AMOUNTS = ("amount", "quantity", "limit")
DEFAULTS = {"v": 1, "kind": "user", "ttl": 900, "partial": False, "at": "period_end", "from_lead": False}

MOST = 9 * 10**18
"""Micro-credits that may come into one account in all its life."""

MANY = 1000
"""Lots with credits left, in whatever form, that one account may have."""

PROMOTIONAL = {"signup", "lead", "bonus", "referral", "promotion", "achievement"}
"""Where credits come from that nobody paid for."""

BUCKETS = (
    "granted",
    "received",
    "restored",
    "available",
    "held",
    "in_transit",
    "consumed",
    "expired",
    "revoked",
    "sent",
)


class Refusal(Exception):
    """The answer "no"; nothing was changed."""

    def __init__(self, code: str, **details: Any) -> None:
        super().__init__(code)
        self.code = code
        self.details = details


def micro(credits: str | int) -> int:
    """Micro-credits of an amount as it is written in a message."""
    exact = Fraction(credits) * 1_000_000
    assert exact.denominator == 1, f"{credits} has more than six decimals"
    return int(exact)


def meaning(name: str, content: Row) -> Row:
    """What a message says, however it is spelt: amounts and instants read, the usual left out or filled in."""
    said: Row = {}
    for field, value in content.items():
        if value is None or DEFAULTS.get(field) == value:
            continue
        if field in AMOUNTS:
            said[field] = micro(value)
        elif field in INSTANTS:
            said[field] = datetime.fromisoformat(value)
        elif field == "lots":
            said[field] = [meaning("a lot", lot) for lot in value]
        elif field == "unit_price":
            said[field] = {**value, "per": micro(value.get("per", 1))}
        else:
            said[field] = value
    if name in ("credits.consume", "credits.hold") and "feature" in said and "quantity" not in said:
        said["quantity"] = micro(1)
    return said


SPENDING = (
    "credits.consume", "credits.hold", "credits.transfer", "credits.convert", "codes.issue", "referrals.issue",
    "referrals.claim",
)  # fmt: skip
"""What an account that an administrator has frozen may not do."""

CONCLUDING = (
    "credits.confirm", "credits.bounce", "credits.claw_back", "credits.convert", "accounts.reopen", "codes.conclude",
    "codes.withdraw",
)  # fmt: skip
"""What also reaches a closed account."""

RETURNING = ("credits.capture", "credits.release", "credits.refund")
"""What also reaches a lead that has become a user."""


def fingerprint(*parts: str) -> str:
    """What ids are made of that the ledger derives."""
    return sha256("".join(f"{len(part.encode())}:{part}" for part in parts).encode()).hexdigest()


def derived(step: str, sender: str, transfer: str) -> str:
    """The id of what the ledger sends itself because of a transfer."""
    return f"transfer.{step}:{fingerprint(sender, transfer)}"


def told_id(code: str, slot: int) -> str:
    """The id under which who paid for a code learns of one of its uses."""
    return f"code.conclude:{fingerprint(code, str(slot))}"


class Ledger:
    """One account.

    :param policy: the catalog as plain data: ``features`` (each with ``price`` and ``per`` in millionths and
        ``rounding``), ``signup`` and ``lead`` (``credits`` in micro-credits, ``source``, ``expires_days``),
        ``priorities``, ``sources`` (whether they may be given away), ``packs`` (name, micro-credits, minor units,
        price as text), ``on_spent``, ``refund_days``, and perhaps ``achievements`` (each with ``name``, ``at`` and
        ``credits`` in micro-credits, ``expires_days``).
    """

    def __init__(self, policy: Row) -> None:
        self.policy = policy
        self.opened = False
        self.closed = False
        self.halted = False
        self.kind = "user"
        self.became: str | None = None
        """Of a lead that has signed up, the user."""
        self.destinations: dict[str, str] = {}
        self.journeys: dict[str, list[Row]] = {}
        self.letters: list[tuple[str, str, Row]] = []
        self.lots: list[Row] = []
        self.holds: dict[str, Row] = {}
        self.charges: dict[str, list[Row]] = {}
        self.answers: dict[str, tuple[str, Row, Row]] = {}
        self.movements: list[Row] = []
        self.debt = 0
        self.returned: dict[str, Row] = {}
        self.codes: dict[str, Row] = {}
        """Gift codes, of all accounts that share them: put another in its place."""
        self.achieved: dict[str, int] = {}

    # The one way in.

    def do(self, name: str, operation: str, content: Row, now: datetime) -> Row:
        """Apply one operation and answer it; amounts of the answer are in micro-credits."""
        said = meaning(name, content)
        self.letters = []
        if operation in self.answers:
            first_name, first_said, first_answer = self.answers[operation]
            if (first_name, first_said) == (name, said):
                if name == "credits.open" and first_answer["status"] == "applied":
                    self.call_the_lead(said)
                if name == "credits.receive" and first_answer["status"] == "applied":
                    self.answer_the_sender("credits.confirm", said)
                elif name == "credits.receive" and operation == derived("receive", said["sender"], said["transfer"]):
                    self.answer_the_sender("credits.bounce", said, refused=first_answer["code"])
                return {**first_answer, "replayed": True}
            return {"status": "rejected", "code": "id_conflict", "replayed": False}
        self.settle(now)
        try:
            if not self.opened and name != "credits.open":
                raise Refusal("unknown_account")
            if self.closed and name not in CONCLUDING:
                if self.became is None:
                    raise Refusal("account_closed")
                is_bought = name == "credits.grant" and said.get("purchase") is not None
                if name not in RETURNING and not is_bought:
                    raise Refusal("account_closed", converted_to=self.became)
            if self.halted and name in SPENDING:
                raise Refusal("account_frozen")
            family, _, deed = name.partition(".")
            prefix = {"codes": "code_", "referrals": "referral_"}.get(family, "")
            step: Callable[[Row, str, datetime], Row] = getattr(self, prefix + deed + "_")
            details = step(said, operation, now)
            answer = {"status": "applied", "code": None, "charged": 0, "uses": [], **details}
            new = self.achieve(operation, now)
            if new:
                answer["achieved"] = new
        except Refusal as refusal:
            answer = {"status": "rejected", "code": refusal.code, "charged": 0, "uses": [], **refusal.details}
            if name == "credits.receive" and operation == derived("receive", said["sender"], said["transfer"]):
                self.answer_the_sender("credits.bounce", said, refused=refusal.code)
        answer["balance"] = self.balance(now)
        answer["replayed"] = False
        self.answers[operation] = (name, said, answer)
        if self.became is not None and self.going_along(now):
            follower = {"account": said["account"], "to": self.became, "after": operation}
            id = f"lead.convert:{fingerprint(said['account'], self.became, operation)}"
            self.letters.append(("credits.convert", id, follower))
        return answer

    def achieve(self, operation: str, now: datetime) -> list[tuple[str, int, int | None]]:
        """What the operation under way brought: the lowest first, each with its credits and the lot they are in."""
        used = sum(lot["consumed"] - lot["restored"] for lot in self.lots)
        brought: list[tuple[str, int, int | None]] = []
        if self.closed or self.halted:
            return brought
        wanted = [each for each in self.policy.get("achievements", []) if each["name"] not in self.achieved]
        for each in sorted(wanted, key=lambda each: (each["at"], each["name"])):
            came = sum(lot["granted"] + lot["received"] + lot["restored"] for lot in self.lots)
            alive = [lot for lot in self.lots if lot["available"] + lot["held"] + lot["in_transit"] > 0]
            full = each["credits"] > 0 and (came + each["credits"] > MOST or len(alive) >= MANY)
            if used < each["at"] or full:
                continue
            number = None
            if each["credits"]:
                end = None if each["expires_days"] is None else now + timedelta(days=each["expires_days"])
                lot = self.add_lot(operation, now, "achievement", end=end)
                self.come_in(lot, each["credits"], operation, now)
                number = lot["number"]
            self.achieved[each["name"]] = len(self.answers) + 1
            brought.append((each["name"], each["credits"], number))
        return brought

    # The operations.

    def open_(self, said: Row, operation: str, now: datetime) -> Row:
        if self.opened:
            raise Refusal("account_exists")
        self.opened = True
        kind = self.kind = said.get("kind", "user")
        self.call_the_lead(said)
        if kind == "pool" or not said.get("welcome", True):
            return {}
        welcome = self.policy["signup"] if kind == "user" else self.policy["lead"]
        if welcome["credits"] == 0:
            return {}
        end = None
        if welcome["expires_days"] is not None:
            end = now + timedelta(days=welcome["expires_days"])
        lot = self.add_lot(operation, now, source=welcome["source"], end=end)
        self.move("granted", lot, welcome["credits"], now, operation)
        return {"uses": [(lot["number"], welcome["credits"])]}

    def call_the_lead(self, said: Row) -> None:
        """The lead that somebody was is told whom it has become."""
        if "lead" in said:
            content = {"account": said["lead"], "to": said["account"]}
            self.letters.append(("credits.convert", f"lead.convert:{fingerprint(*content.values())}", content))

    def grant_(self, said: Row, operation: str, now: datetime) -> Row:
        start = said.get("effective_at", now)
        end = said.get("expires_at")
        if "expires_in" in said:
            end = start + timedelta(seconds=said["expires_in"])
        if end is not None and (end <= start or end <= now):
            raise Refusal("invalid")
        self.make_room(said["amount"])
        scope = set(said["features"]) if "features" in said else None
        lot = self.add_lot(
            operation, now, said["source"], said.get("priority"), scope, start, end, said.get("purchase")
        )
        lot["price"] = said.get("unit_price")
        return self.come_in(lot, said["amount"], operation, now)

    def adjust_(self, said: Row, operation: str, now: datetime) -> Row:
        if said["amount"] > 0:
            self.make_room(said["amount"])
            return self.come_in(self.add_lot(operation, now, "adjustment"), said["amount"], operation, now)
        takings = self.find(-said["amount"], None, now)
        for lot, taken in takings:
            self.move("revoked", lot, taken, now, operation)
            self.root_of(lot)["clawed_back"] += taken
        return {"charged": -said["amount"], "uses": [(lot["number"], taken) for lot, taken in takings]}

    def consume_(self, said: Row, operation: str, now: datetime) -> Row:
        cost = self.cost(said)
        feature = said.get("feature")
        payable = min(cost, self.spendable(feature, now)) if said.get("partial") else cost
        if payable == 0 and cost > 0:
            raise self.shortage(cost, 0)
        takings = self.find(payable, feature, now)
        for lot, taken in takings:
            self.move("consumed", lot, taken, now, operation)
        self.charges[operation] = [{"lot": lot, "taken": taken, "back": 0} for lot, taken in takings]
        details: Row = {"charged": payable, "uses": [(lot["number"], taken) for lot, taken in takings]}
        if payable < cost:
            details.update(self.shortage(cost, payable).details)
        return details

    def hold_(self, said: Row, operation: str, now: datetime) -> Row:
        cost = self.cost(said)
        takings = self.find(cost, said.get("feature"), now)
        for lot, taken in takings:
            self.move("held", lot, taken, now, operation)
        self.holds[operation] = {
            "id": operation,
            "amount": cost,
            "feature": said.get("feature"),
            "end": now + timedelta(seconds=said.get("ttl", 900)),
            "open": True,
            "lines": [{"lot": lot, "taken": taken, "back": 0} for lot, taken in takings],
        }
        return {
            "charged": cost,
            "uses": [(lot["number"], taken) for lot, taken in takings],
            "hold": operation,
            "expires_at": self.holds[operation]["end"],
        }

    def capture_(self, said: Row, operation: str, now: datetime) -> Row:
        hold = self.open_hold(said["hold"])
        final = self.final(hold, said)
        if self.halted and final > hold["amount"]:
            raise Refusal("account_frozen")
        extra = self.find(final - hold["amount"], hold["feature"], now) if final > hold["amount"] else []
        if final < hold["amount"]:
            self.unhold(hold, hold["amount"] - final, now, now, operation)
        hold["open"] = False
        receipt = []
        for line in hold["lines"]:
            kept = line["taken"] - line["back"]
            if kept:
                self.move("captured", line["lot"], kept, now, operation, hold["id"])
                receipt.append({"lot": line["lot"], "taken": kept, "back": 0})
        for lot, taken in extra:
            self.move("consumed", lot, taken, now, operation, hold["id"])
            receipt.append({"lot": lot, "taken": taken, "back": 0})
        self.charges[operation] = receipt
        uses = [(line["lot"]["number"], line["taken"]) for line in receipt]
        return {"charged": final, "uses": uses, "hold": hold["id"]}

    def final(self, hold: Row, said: Row) -> int:
        """What a hold is captured with."""
        if "quantity" not in said:
            return int(said["amount"] if "amount" in said else hold["amount"])
        if hold["feature"] is None:
            raise Refusal("invalid")
        return self.price(hold["feature"], said["quantity"])

    def release_(self, said: Row, operation: str, now: datetime) -> Row:
        hold = self.open_hold(said["hold"])
        self.unhold(hold, hold["amount"], now, now, operation)
        hold["open"] = False
        uses = [(line["lot"]["number"], line["taken"]) for line in hold["lines"]]
        return {"charged": -hold["amount"], "uses": uses, "hold": hold["id"]}

    def refund_(self, said: Row, operation: str, now: datetime) -> Row:
        if said["operation"] not in self.charges:
            raise Refusal("unknown_charge")
        receipt = self.charges[said["operation"]]
        left = sum(line["taken"] - line["back"] for line in receipt)
        amount = said.get("amount", left)
        if left == 0 or amount > left:
            raise Refusal("exceeds_original")
        self.make_room(amount)
        alive = [lot for lot in self.lots if lot["available"] + lot["held"] + lot["in_transit"] > 0]
        if len(alive) + len(receipt) > MANY:
            raise Refusal("limit_reached")
        uses = []
        missing = amount
        for line in reversed(receipt):
            back = min(missing, line["taken"] - line["back"])
            if back == 0:
                continue
            missing -= back
            line["back"] += back
            lot = line["lot"]
            if lot["end"] is not None and lot["end"] <= now:
                lot = self.add_successor(lot, operation, now)
            self.move("restored", lot, back, now, operation, said["operation"])
            uses.append((lot["number"], back))
            self.take_what_is_owed(lot, back, now, now, operation)
        assert missing == 0
        return {"charged": -amount, "uses": uses}

    def revoke_(self, said: Row, operation: str, now: datetime) -> Row:
        if "grant" in said:
            named = [self.root_of(lot) for lot in self.lots if lot["number"] == said["grant"]]
        else:
            named = [lot for lot in self.lots if lot["origin"] is None and lot["purchase"] == said["purchase"]]
        if not named:
            raise Refusal("unknown_grant")
        roots = sorted(named, key=lambda root: int(root["number"]))
        revocable = self.worth_together(roots)
        wanted = said.get("amount", revocable)
        if wanted == 0 or wanted > revocable:
            raise Refusal("exceeds_original")
        return self.take_from(roots, wanted, operation, now, now)

    def take_from(
        self,
        roots: list[Row],
        wanted: int,
        operation: str | None,
        at: datetime,
        now: datetime,
        pile: list[Row] | None = None,
    ) -> Row:
        """Take so much of what lots gave, the last to burn first; each part is a slip on a pile, if there is one."""
        uses = []
        missing = wanted
        for lot in reversed(in_burn_down_order([lot for root in roots for lot in self.family_of(root)])):
            root = self.root_of(lot)
            # What is booked as taken is worth nothing from then on: the worth is looked up anew for every lot.
            taken = min(lot["available"], self.worth(root), missing)
            if taken:
                self.move("revoked", lot, taken, now, operation, None, at)
                root["clawed_back"] += taken
                uses.append((lot["number"], taken))
                missing -= taken
                if pile is not None:
                    pile.append({"root": root, "lot": lot, "what": "credits", "much": taken, "covers": []})
        details: Row = {"charged": wanted - missing, "uses": uses}
        if missing:
            details["forgiven" if self.policy["on_spent"] == "forgive" else "owed"] = missing
            self.charge_what_is_away(roots, missing, operation, at, now, pile)
        return details

    def claw_back_(self, said: Row, operation: str, now: datetime) -> Row:
        known = self.returned.get(said["purchase"])
        if known is not None and known["step"] >= said["step"]:
            return {}
        was_frozen = known is not None and known["frozen"]
        self.returned[said["purchase"]] = {
            "step": said["step"],
            "share": self.share_away(said["returned_minor"], said["paid_minor"]),
            "frozen": said.get("frozen", False),
            "pile": [] if known is None else known["pile"],
        }
        before = len(self.movements)
        details = self.bring_to_its_share(said["purchase"], operation, now, now)
        if not details:
            details = self.put_back(said["purchase"], operation, now)
        is_frozen = said.get("frozen", False)
        own = [lot for lot in self.lots if lot["purchase"] == said["purchase"]]
        if was_frozen and not is_frozen:
            for lot in in_burn_down_order(own):
                self.pay_debt_with(lot, lot["available"], now, now, operation)
        if was_frozen != is_frozen:
            details["frozen" if is_frozen else "thawed"] = sum(lot["available"] for lot in own)
        written = self.movements[before:]
        out = sum(line["amount"] for line in written if line["kind"] == "revoked")
        back = sum(line["amount"] for line in written if line["kind"] == "reinstated")
        return {**details, "charged": out - back}

    def share_away(self, returned: int, paid: int) -> Fraction:
        """Which part of what was paid is away: nothing of nothing."""
        return min(Fraction(returned, paid), Fraction(1)) if paid else Fraction(0)

    def should_be_away(self, purchase: str) -> int:
        """What is to be taken of a purchase yet; below nothing, what was taken too much."""
        roots = [lot for lot in self.lots if lot["purchase"] == purchase and lot["origin"] is None]
        given = sum(lot["granted"] + lot["received"] for lot in roots)
        share: Fraction = self.returned[purchase]["share"]
        return int(share * given) - sum(int(root["clawed_back"]) for root in roots)

    def bring_to_its_share(self, purchase: str | None, operation: str | None, at: datetime, now: datetime) -> Row:
        """Take what is to be away of a purchase and is not; what lapsed is gone."""
        if purchase not in self.returned:
            return {}
        roots = [lot for lot in self.lots if lot["purchase"] == purchase and lot["origin"] is None]
        wanted = min(self.should_be_away(purchase), self.worth_together(roots))
        if wanted <= 0:
            return {}
        details = self.take_from(roots, wanted, operation, at, now, self.returned[purchase]["pile"])
        if "owed" in details:
            for lot in reversed(in_burn_down_order([lot for lot in self.lots if lot["purchase"] == purchase])):
                self.pay_debt_with(lot, lot["available"], at, now, operation, purchase)
        return details

    def put_back(self, purchase: str, operation: str, now: datetime) -> Row:
        """Go down the pile: what is open on a slip is let go, then what covered it goes back to where it came from."""
        pile: list[Row] = self.returned[purchase]["pile"]
        back = min(-self.should_be_away(purchase), sum(slip["much"] for slip in pile))
        if back <= 0:
            return {}
        left = back
        no_more_owed: dict[int, int] = {}
        going: dict[int, int] = {}
        while left:
            slip = pile[-1]
            root = slip["root"]
            if slip["what"] == "credits":
                much = min(left, slip["much"])
                going[slip["lot"]["number"]] = going.get(slip["lot"]["number"], 0) + much
            elif self.open_on(slip):
                much = min(left, self.open_on(slip))
                if slip["what"] == "forgiven":
                    root["forgiven"] -= much
                else:
                    no_more_owed[root["number"]] = no_more_owed.get(root["number"], 0) + much
            else:
                last = slip["covers"][-1]
                much = min(left, last[1])
                last[1] -= much
                if last[1] == 0:
                    slip["covers"].pop()
                going[last[0]["number"]] = going.get(last[0]["number"], 0) + much
            slip["much"] -= much
            root["clawed_back"] -= much
            left -= much
            if slip["much"] == 0:
                pile.pop()
        for number, much in no_more_owed.items():
            self.move("debt_cancelled", self.lots[number - 1], much, now, operation)
        uses = []
        for number, much in going.items():
            lot = self.lots[number - 1]
            self.move("reinstated", lot, much, now, operation)
            if lot["end"] is not None and lot["end"] <= now:
                room = MOST - sum(each["granted"] + each["received"] + each["restored"] for each in self.lots)
                carried = min(much, room)
                if much > carried:
                    self.move("expired", lot, much - carried, now, operation)
                if carried:
                    after = self.add_successor(lot, operation, now)
                    self.move("rolled_out", lot, carried, now, operation)
                    self.move("rolled_in", after, carried, now, operation)
                    self.take_what_is_owed(after, carried, now, now, operation)
                    lot = after
            else:
                self.take_what_is_owed(lot, much, now, now, operation)
            uses.append((lot["number"], much))
        return {"uses": uses, "restored": back}

    def is_frozen(self, lot: Row) -> bool:
        """Whether a lot's purchase is disputed: what it has is there, and cannot be used."""
        return lot["purchase"] in self.returned and bool(self.returned[lot["purchase"]]["frozen"])

    def charge_what_is_away(
        self,
        roots: list[Row],
        wanted: int,
        operation: str | None,
        at: datetime,
        now: datetime,
        pile: list[Row] | None,
    ) -> None:
        """Share what cannot be taken among the families: by what each has away, then by what each is worth."""
        shares: list[int] = []
        for root in roots:
            family = self.family_of(root)
            away = sum(lot["consumed"] + lot["held"] + lot["in_transit"] + lot["sent"] for lot in family)
            away -= sum(lot["restored"] for lot in family) + self.carried(family)
            unforgiven = max(away - root["forgiven"], 0)
            shares.append(min(unforgiven, self.worth(root), wanted - sum(shares)))
        for place, root in enumerate(roots):
            shares[place] += min(self.worth(root) - shares[place], wanted - sum(shares))
        assert sum(shares) == wanted
        for root, share in zip(roots, shares, strict=True):
            if share == 0:
                continue
            root["clawed_back"] += share
            if self.policy["on_spent"] == "forgive":
                root["forgiven"] += share
                what = "forgiven"
            else:
                self.move("debt_incurred", root, share, now, operation, None, at)
                what = "debt"
            if pile is not None:
                pile.append({"root": root, "lot": root, "what": what, "much": share, "covers": []})

    def settle_(self, said: Row, operation: str, now: datetime) -> Row:
        return {}

    def transfer_(self, said: Row, operation: str, now: datetime) -> Row:
        amount = said["amount"]
        everything = self.spendable(None, now)
        if everything < amount:
            raise self.shortage(amount, everything)
        free = [lot for lot in self.lots if self.can_pay(lot, None, now) and self.may_leave(lot["source"])]
        if sum(lot["available"] for lot in free) < amount:
            short = self.shortage(amount, sum(lot["available"] for lot in free))
            raise Refusal("not_transferable", **short.details)
        journey: list[Row] = []
        for lot in in_burn_down_order(free):
            taken = min(lot["available"], amount - sum(line["taken"] for line in journey))
            if taken:
                self.move("transferred", lot, taken, now, operation)
                journey.append({"lot": lot, "taken": taken})
        return self.send_off(said, operation, journey, now, message=said.get("message"))

    def convert_(self, said: Row, operation: str, now: datetime) -> Row:
        """A lead has signed up: all of it goes, but for what is disputed; first it pays what it owes."""
        if self.became is not None and self.became != said["to"]:
            raise Refusal("already_converted", converted_to=self.became)
        if self.closed and self.became is None:
            raise Refusal("account_closed")
        if self.kind != "lead":
            raise Refusal("invalid")
        for lot in self.going_along(now):
            self.pay_debt_with(lot, lot["available"], now, now, operation)
        journey = [{"lot": lot, "taken": lot["available"]} for lot in self.going_along(now)]
        for line in journey:
            self.move("transferred", line["lot"], line["taken"], now, operation)
        self.closed, self.became = True, said["to"]
        return self.send_off(said, operation, journey, now, from_lead=True)

    def going_along(self, now: datetime) -> list[Row]:
        """What a lead takes along."""
        there = [lot for lot in self.lots if lot["available"] and not self.is_frozen(lot)]
        return in_burn_down_order([lot for lot in there if lot["end"] is None or lot["end"] > now])

    def send_off(self, said: Row, operation: str, journey: list[Row], now: datetime, **more: Any) -> Row:
        """Credits are on their way, if there are any."""
        letter = {
            "account": said["to"],
            "sender": said["account"],
            "transfer": operation,
            "lots": [
                {
                    "source": line["lot"]["source"],
                    "amount": line["taken"],
                    "priority": line["lot"]["priority"],
                    "expires_at": line["lot"]["end"],
                    "unit_price": line["lot"]["price"],
                    "features": None if line["lot"]["scope"] is None else sorted(line["lot"]["scope"]),
                    "effective_at": line["lot"]["start"] if line["lot"]["start"] > now else None,
                }
                for line in journey
            ],
            **more,
        }
        if journey:
            self.journeys[operation] = journey
            self.letters.append(("credits.receive", derived("receive", said["account"], operation), letter))
            if "from_lead" in more:
                self.destinations[operation] = said["to"]
        return {
            "charged": sum(line["taken"] for line in journey),
            "uses": [(line["lot"]["number"], line["taken"]) for line in journey],
            "to": said["to"],
        }

    # What an administrator does.

    def freeze_(self, said: Row, operation: str, now: datetime) -> Row:
        if self.halted:
            raise Refusal("invalid")
        self.halted = True
        return {"account_status": "frozen"}

    def thaw_(self, said: Row, operation: str, now: datetime) -> Row:
        if not self.halted:
            raise Refusal("invalid")
        self.halted = False
        return {"account_status": "open"}

    def close_(self, said: Row, operation: str, now: datetime) -> Row:
        if any(hold["open"] for hold in self.holds.values()) or any(lot["in_transit"] for lot in self.lots):
            raise Refusal("invalid")
        gone = [(lot, lot["available"]) for lot in in_burn_down_order(self.lots) if lot["available"]]
        for lot, amount in gone:
            self.move("revoked", lot, amount, now, operation)
            self.root_of(lot)["clawed_back"] += amount
        self.closed, self.halted = True, False
        uses = [(lot["number"], amount) for lot, amount in gone]
        return {"account_status": "closed", "charged": sum(amount for _, amount in gone), "uses": uses}

    def reopen_(self, said: Row, operation: str, now: datetime) -> Row:
        if self.became is not None:
            raise Refusal("already_converted", converted_to=self.became)
        if not self.closed:
            raise Refusal("invalid")
        self.closed = False
        return {"account_status": "open"}

    def receive_(self, said: Row, operation: str, now: datetime) -> Row:
        if operation != derived("receive", said["sender"], said["transfer"]):
            raise Refusal("invalid")
        if said.get("from_lead") and self.kind != "user":
            raise Refusal("invalid")
        alive = [lot for lot in self.lots if lot["available"] + lot["held"] + lot["in_transit"] > 0]
        if len(alive) + len(said["lots"]) > MANY:
            raise Refusal("limit_reached")
        self.make_room(sum(came["amount"] for came in said["lots"]))
        uses = []
        for came in said["lots"]:
            end = came.get("expires_at")
            scope = set(came["features"]) if "features" in came else None
            start = came.get("effective_at", now)
            lot = self.add_lot(operation, now, came["source"], came["priority"], scope, start, end)
            lot["price"] = came.get("unit_price")
            self.move("received", lot, came["amount"], now, operation)
            if end is not None and end <= now:
                self.move("expired", lot, came["amount"], now, operation)
            else:
                self.take_what_is_owed(lot, came["amount"], now, now, operation)
            uses.append((lot["number"], came["amount"]))
        self.answer_the_sender("credits.confirm", said)
        return {"uses": uses, "sender": said["sender"], "transfer": said["transfer"]}

    def answer_the_sender(self, name: str, said: Row, **more: str) -> None:
        content = {"account": said["sender"], "transfer": said["transfer"], **more}
        self.letters.append((name, derived("conclude", said["sender"], said["transfer"]), content))

    def confirm_(self, said: Row, operation: str, now: datetime) -> Row:
        uses = []
        for line in self.journey(said, operation):
            self.move("sent", line["lot"], line["taken"], now, operation, said["transfer"])
            uses.append((line["lot"]["number"], line["taken"]))
        return {"uses": uses, "transfer": said["transfer"]}

    def bounce_(self, said: Row, operation: str, now: datetime) -> Row:
        uses = []
        for line in reversed(self.journey(said, operation)):
            lot, back = line["lot"], line["taken"]
            self.move("bounced", lot, back, now, operation, said["transfer"])
            self.settle_in(lot, back, now, now, operation, said["transfer"])
            uses.append((lot["number"], back))
        if said["transfer"] in self.destinations and self.became == self.destinations[said["transfer"]]:
            self.closed, self.became = False, None
        back = sum(each for _, each in uses)
        return {"charged": -back, "uses": uses, "transfer": said["transfer"], "refused": said["refused"]}

    def journey(self, said: Row, operation: str) -> list[Row]:
        if said["transfer"] not in self.journeys:
            raise Refusal("unknown_transfer")
        if operation != derived("conclude", said["account"], said["transfer"]):
            raise Refusal("invalid")
        return self.journeys[said["transfer"]]

    # Gift codes: a code is a booklet of stubs, one for each use, each with the credits that were put into it.

    def code_issue_(self, said: Row, operation: str, now: datetime) -> Row:
        days = self.policy.get("code_days", 365)
        end = said.get("expires_at", now + timedelta(seconds=said.get("expires_in", days * 86400)))
        if end <= now:
            raise Refusal("invalid")
        if any(text in self.codes for text in said["codes"]):
            raise Refusal("code_exists")
        uses = said.get("uses", 1)
        paid: list[tuple[Row, int]] = []
        if "actor" not in said:
            all_of_it = said["amount"] * uses * len(said["codes"])
            everything = self.spendable(None, now)
            if everything < all_of_it:
                raise self.shortage(all_of_it, everything)
            free = [lot for lot in self.lots if self.can_pay(lot, None, now) and self.may_leave(lot["source"])]
            if sum(lot["available"] for lot in free) < all_of_it:
                short = self.shortage(all_of_it, sum(lot["available"] for lot in free))
                raise Refusal("not_transferable", **short.details)
            for lot in in_burn_down_order(free):
                taken = min(lot["available"], all_of_it - sum(much for _, much in paid))
                if taken:
                    self.move("transferred", lot, taken, now, operation)
                    paid.append((lot, taken))
        purse = list(paid)
        for text in said["codes"]:
            stubs: list[list[tuple[Row, int]]] = []
            for _ in range(uses if paid else 0):
                stub, missing = [], said["amount"]
                while missing:
                    lot, there = purse.pop(0)
                    stub.append((lot, min(there, missing)))
                    if there > missing:
                        purse.insert(0, (lot, there - missing))
                    missing -= stub[-1][1]
                stubs.append(stub)
            ends = [lot["end"] for stub in stubs for lot, _ in stub if lot["end"] is not None]
            self.codes[text] = {
                "by": said["account"], "issue": operation, "amount": said["amount"], "uses": uses, "stubs": stubs,
                "each": said.get("per_account", 1), "end": min([end, *ends]), "closed": False, "users": [],
                "source": None if paid else said.get("source", "promotion"), "life": said.get("credits_expire_in"),
                "parcels": [[self.parcel(lot, much) for lot, much in stub] for stub in stubs],
                "place": said["codes"].index(text),
            }  # fmt: skip
        return {
            "charged": sum(much for _, much in paid),
            "uses": [(lot["number"], much) for lot, much in paid],
            "expires_at": min(self.codes[text]["end"] for text in said["codes"]),
        }

    def parcel(self, lot: Row, much: int) -> Row:
        return {**{name: lot[name] for name in ("source", "priority", "end", "price")}, "amount": much}

    def code_redeem_(self, said: Row, operation: str, now: datetime) -> Row:
        code = self.codes.get(said["code"])
        if code is None:
            raise Refusal("code_unknown")
        if code["closed"] or code["end"] <= now:
            raise Refusal("code_expired")
        if len(code["users"]) == code["uses"] or code["users"].count(said["account"]) >= code["each"]:
            raise Refusal("code_used")
        slot = len(code["users"])
        came = code["parcels"][slot] if code["stubs"] else [{
            "source": code["source"], "priority": None, "price": None, "amount": code["amount"],
            "end": None if code["life"] is None else now + timedelta(seconds=code["life"]),
        }]  # fmt: skip
        alive = [lot for lot in self.lots if lot["available"] + lot["held"] + lot["in_transit"] > 0]
        if len(alive) + len(came) > MANY:
            raise Refusal("limit_reached")
        self.make_room(code["amount"])
        uses = []
        for parcel in came:
            lot = self.add_lot(operation, now, parcel["source"], parcel["priority"], end=parcel["end"])
            lot["price"] = parcel["price"]
            self.move("received" if code["stubs"] else "granted", lot, parcel["amount"], now, operation)
            assert lot["end"] is None or lot["end"] > now, "a code ends before its credits do"
            self.take_what_is_owed(lot, parcel["amount"], now, now, operation)
            uses.append((lot["number"], parcel["amount"]))
        code["users"].append(said["account"])
        details = {"uses": uses, "gift_code": said["code"]}
        if not code["stubs"]:
            return details
        letter = {
            "account": code["by"], "code": said["code"], "issue": code["issue"], "place": code["place"], "slot": slot,
            "redeemed_by": said["account"],
        }  # fmt: skip
        self.letters.append(("codes.conclude", told_id(said["code"], slot), letter))
        return {**details, "sender": code["by"]}

    def code_conclude_(self, said: Row, operation: str, now: datetime) -> Row:
        if operation != told_id(said["code"], said["slot"]):
            raise Refusal("invalid")
        code = self.codes.get(said["code"])
        if code is None or (code["by"], code["issue"]) != (said["account"], said["issue"]) or not code["stubs"]:
            raise Refusal("code_unknown")
        if code["place"] != said["place"] or said["slot"] >= code["uses"]:
            raise Refusal("code_unknown")
        stub = code["stubs"][said["slot"]]
        for lot, much in stub:
            self.move("sent", lot, much, now, operation, code["issue"])
        return {
            "uses": [(lot["number"], much) for lot, much in stub],
            "gift_code": said["code"],
            "to": said["redeemed_by"],
        }

    def code_withdraw_(self, said: Row, operation: str, now: datetime) -> Row:
        own = [self.codes[text] for text in said["codes"] if self.codes.get(text, {}).get("by") == said["account"]]
        if "actor" not in said and any(
            code["source"] is not None and not code["closed"] and code["end"] > now for code in own
        ):
            raise Refusal("invalid")
        if len(own) < len(said["codes"]):
            raise Refusal("code_unknown")
        back = []
        for code in own:
            left = [] if code["closed"] else code["stubs"][len(code["users"]) :]
            code["closed"] = True
            # A lot's credits of uses that lie side by side come back in one.
            pieces: list[tuple[Row, int]] = []
            for lot, much in [piece for stub in left for piece in stub]:
                if pieces and pieces[-1][0] is lot:
                    much += pieces.pop()[1]
                pieces.append((lot, much))
            for lot, much in reversed(pieces):
                self.move("bounced", lot, much, now, operation, code["issue"])
                self.settle_in(lot, much, now, now, operation, code["issue"])
                back.append((lot["number"], much))
        return {"charged": -sum(much for _, much in back), "uses": back}

    def may_leave(self, source: str) -> bool:
        if source in self.policy["sources"]:
            return bool(self.policy["sources"][source])
        return source not in PROMOTIONAL | {self.policy["signup"]["source"], self.policy["lead"]["source"]}

    # Time.

    def settle(self, now: datetime) -> None:
        """Look for what is due, apply the first of it, look again."""
        while True:
            due: list[tuple[datetime, int, Any, Row]] = []
            due += [(h["end"], 0, h["id"], h) for h in self.holds.values() if h["open"] and h["end"] <= now]
            due += [
                (lot["end"], 1, lot["number"], lot)
                for lot in self.lots
                if lot["available"] and lot["end"] is not None and lot["end"] <= now
            ]
            if not due:
                return
            instant, rank, _, what = min(due, key=lambda item: item[:3])
            if rank == 0:
                self.unhold(what, what["amount"], instant, now, None)
                what["open"] = False
            else:
                self.move("expired", what, what["available"], now, None, None, instant)

    # What the operations share.

    def cost(self, said: Row) -> int:
        if "amount" in said:
            return int(said["amount"])
        return self.price(said["feature"], said.get("quantity", 1_000_000))

    def price(self, name: str, quantity: int) -> int:
        if name not in self.policy["features"]:
            raise Refusal("unknown_feature")
        feature = self.policy["features"][name]
        blocks = Fraction(quantity, feature["per"])
        if feature["rounding"] == "up":
            blocks = Fraction(ceil(blocks))
        cost: int = ceil(blocks * feature["price"])
        if cost > 10**18:
            raise Refusal("invalid")
        return cost

    def can_pay(self, lot: Row, feature: str | None, now: datetime) -> bool:
        if lot["available"] == 0 or lot["start"] > now or self.is_frozen(lot):
            return False
        if lot["end"] is not None and lot["end"] <= now:
            return False
        return lot["scope"] is None or feature in lot["scope"]

    def spendable(self, feature: str | None, now: datetime) -> int:
        return sum(int(lot["available"]) for lot in self.lots if self.can_pay(lot, feature, now))

    def find(self, amount: int, feature: str | None, now: datetime) -> list[tuple[Row, int]]:
        """Which lots pay, in the order of taking; all or nothing."""
        covered = self.spendable(feature, now)
        if covered < amount:
            raise self.shortage(amount, covered)
        takings = []
        for lot in in_burn_down_order([lot for lot in self.lots if self.can_pay(lot, feature, now)]):
            taken = min(amount, lot["available"])
            if taken:
                takings.append((lot, taken))
                amount -= taken
        return takings

    def shortage(self, required: int, available: int) -> Refusal:
        details: Row = {"required": required, "available": available, "shortfall": required - available}
        best: Row | None = None
        for pack in self.offers(required - available):
            if (
                best is None
                or pack["minor"] < best["minor"]
                or (pack["minor"] == best["minor"] and pack["credits"] > best["credits"])
            ):
                best = pack
        if best is not None:
            details["offer"] = best["name"]
        return Refusal("insufficient_credits", **details)

    def offers(self, shortfall: int) -> list[Row]:
        """What is for sale that covers so much."""
        return [pack for pack in self.policy["packs"] if pack["credits"] >= shortfall]

    def open_hold(self, operation: str) -> Row:
        if operation not in self.holds:
            raise Refusal("unknown_hold")
        if not self.holds[operation]["open"]:
            raise Refusal("hold_closed")
        return self.holds[operation]

    def unhold(self, hold: Row, amount: int, at: datetime, now: datetime, operation: str | None) -> None:
        """The last taken goes back first; what has no grant to live in any more lapses."""
        for line in reversed(hold["lines"]):
            back = min(amount, line["taken"])
            if back == 0:
                continue
            amount -= back
            line["back"] = back
            lot = line["lot"]
            self.move("released", lot, back, now, operation, hold["id"], at)
            self.settle_in(lot, back, at, now, operation, hold["id"])
        assert amount == 0

    def settle_in(
        self, lot: Row, back: int, at: datetime, now: datetime, operation: str | None, refers_to: str
    ) -> None:
        """Of what came back into a lot: what is owed is taken, what is over lapses."""
        over = lot["end"] is not None and lot["end"] <= at
        if not over or self.root_of(lot)["clawed_back"] > 0:
            back -= self.take_what_is_owed(lot, back, at, now, operation)
        if over and back > 0:
            self.move("expired", lot, back, now, operation, refers_to, at)

    def take_what_is_owed(self, lot: Row, came: int, at: datetime, now: datetime, operation: str | None) -> int:
        """Of the credits that just came into a lot: first what was forgiven of its family, then the debt."""
        root = self.root_of(lot)
        taken = min(came, root["forgiven"])
        if taken:
            self.move("revoked", lot, taken, now, operation, None, at)
            root["forgiven"] -= taken
            self.cover("forgiven", lot, taken, root)
        return int(taken + self.pay_debt_with(lot, came - taken, at, now, operation))

    def pay_debt_with(
        self, lot: Row, most: int, at: datetime, now: datetime, operation: str | None, purchase: str | None = None
    ) -> int:
        """A lot pays what is owed, for one purchase or for all; a frozen one for its own. Gives how much."""
        if purchase is None and self.is_frozen(lot):
            purchase = lot["purchase"]
        owed = self.debt
        if purchase is not None:
            owed = sum(self.open_on(slip) for slip in self.returned[purchase]["pile"] if slip["what"] == "debt")
        paid = min(most, owed)
        if paid:
            self.move("debt_paid", lot, paid, now, operation, None, at)
            self.cover("debt", lot, paid, purchase=purchase)
        return int(paid)

    def open_on(self, slip: Row) -> int:
        """What of a slip nothing stands in for."""
        return int(slip["much"] - sum(much for _, much in slip["covers"]))

    def cover(self, what: str, lot: Row, much: int, root: Row | None = None, purchase: str | None = None) -> None:
        """Note which credits stood in for what could not be taken, on the slips of the oldest lots first."""
        open_slips = [
            slip
            for name, known in self.returned.items()
            if purchase is None or name == purchase
            for slip in known["pile"]
            if slip["what"] == what and (root is None or slip["root"] is root)
        ]
        for slip in sorted(open_slips, key=lambda slip: int(slip["root"]["number"])):
            part = min(much, self.open_on(slip))
            if part:
                slip["covers"].append([lot, part])
                much -= part

    def root_of(self, lot: Row) -> Row:
        """The lot that a lot goes on for; itself, if it was given as it is."""
        return lot if lot["origin"] is None else self.lots[lot["origin"] - 1]

    def family_of(self, root: Row) -> list[Row]:
        """A lot and all that go on for it."""
        return [lot for lot in self.lots if self.root_of(lot) is root]

    def worth(self, root: Row) -> int:
        """What of a family has neither lapsed nor been taken back."""
        family = self.family_of(root)
        came = sum(lot["granted"] + lot["received"] for lot in family)
        lapsed = sum(lot["expired"] for lot in family)
        return int(max(0, came - self.carried(family) - lapsed - root["clawed_back"]))

    def worth_together(self, roots: list[Row]) -> int:
        """What of families has neither lapsed nor been taken back, what was taken too much of one is of the others."""
        lots = [lot for root in roots for lot in self.family_of(root)]
        came = sum(lot["granted"] + lot["received"] for lot in lots) - sum(self.carried([lot]) for lot in lots)
        away = sum(lot["expired"] for lot in lots) + sum(root["clawed_back"] for root in roots)
        return int(max(0, came - away))

    def carried(self, family: list[Row]) -> int:
        """What one of a family handed to another: it is in both, and counts once."""
        return sum(int(lot["received"]) for lot in family if lot["origin"] is not None)

    def come_in(self, lot: Row, amount: int, operation: str, now: datetime) -> Row:
        self.move("granted", lot, amount, now, operation)
        taken = self.bring_to_its_share(lot["purchase"], operation, now, now).get("charged", 0)
        self.take_what_is_owed(lot, lot["available"], now, now, operation)
        details = {"uses": [(lot["number"], amount)], "grant": lot["number"]}
        return {**details, "taken_back": taken} if taken else details

    def make_room(self, amount: int) -> None:
        """Refuse what would take all that ever came in over the most."""
        if sum(lot["granted"] + lot["received"] + lot["restored"] for lot in self.lots) + amount > MOST:
            raise Refusal("limit_reached")

    def add_successor(self, lot: Row, operation: str, now: datetime) -> Row:
        """A lot that goes on where one that has ended left off."""
        after = self.add_lot(
            operation,
            now,
            lot["source"],
            lot["priority"],
            lot["scope"],
            now,
            now + timedelta(days=self.policy["refund_days"]),
            lot["purchase"],
        )
        after["price"] = lot["price"]
        after["origin"] = self.root_of(lot)["number"]
        return after

    def add_lot(
        self,
        operation: str,
        now: datetime,
        source: str,
        priority: int | None = None,
        scope: set[str] | None = None,
        start: datetime | None = None,
        end: datetime | None = None,
        purchase: str | None = None,
    ) -> Row:
        if priority is None:
            priority = self.policy["priorities"].get(source, 100)
        lot: Row = {
            "number": len(self.lots) + 1,
            "source": source,
            "priority": priority,
            "scope": scope,
            "start": now if start is None else start,
            "end": end,
            "born": now,
            "operation": operation,
            "purchase": purchase,
            "price": None,
            "origin": None,
            "clawed_back": 0,
            "forgiven": 0,
            **dict.fromkeys(BUCKETS, 0),
        }
        self.lots.append(lot)
        return lot

    def move(
        self,
        kind: str,
        lot: Row,
        amount: int,
        now: datetime,
        operation: str | None,
        refers_to: str | None = None,
        at: datetime | None = None,
    ) -> None:
        """Credits change buckets, and a line is written about it."""
        assert amount > 0
        if kind == "granted":
            lot["granted"] += amount
            lot["available"] += amount
        elif kind == "restored":
            lot["restored"] += amount
            lot["available"] += amount
        elif kind == "consumed":
            lot["available"] -= amount
            lot["consumed"] += amount
        elif kind == "held":
            lot["available"] -= amount
            lot["held"] += amount
        elif kind == "captured":
            lot["held"] -= amount
            lot["consumed"] += amount
        elif kind == "released":
            lot["held"] -= amount
            lot["available"] += amount
        elif kind == "expired":
            lot["available"] -= amount
            lot["expired"] += amount
        elif kind == "revoked":
            lot["available"] -= amount
            lot["revoked"] += amount
        elif kind == "transferred":
            lot["available"] -= amount
            lot["in_transit"] += amount
        elif kind == "sent":
            lot["in_transit"] -= amount
            lot["sent"] += amount
        elif kind == "unexpired":
            lot["expired"] -= amount
            lot["available"] += amount
        elif kind == "rolled_out":
            lot["available"] -= amount
            lot["sent"] += amount
        elif kind == "bounced":
            lot["in_transit"] -= amount
            lot["available"] += amount
        elif kind in ("received", "rolled_in"):
            lot["received"] += amount
            lot["available"] += amount
        elif kind == "debt_paid":
            lot["available"] -= amount
            lot["revoked"] += amount
            self.debt -= amount
        elif kind == "debt_cancelled":
            self.debt -= amount
        elif kind == "reinstated":
            lot["revoked"] -= amount
            lot["available"] += amount
        else:
            assert kind == "debt_incurred"
            self.debt += amount
        assert lot["available"] >= 0
        assert lot["revoked"] >= 0
        assert lot["held"] >= 0
        assert lot["in_transit"] >= 0
        assert self.debt >= 0
        self.movements.append(
            {
                "operation": operation,
                "kind": kind,
                "lot": lot["number"],
                "amount": amount,
                "balance_after": sum(each["available"] for each in self.lots),
                "at": now if at is None else at,
                "refers_to": refers_to,
                "recorded_at": now,
            }
        )

    def due(self) -> datetime | None:
        """The next instant at which time alone changes anything."""
        ends = [hold["end"] for hold in self.holds.values() if hold["open"]]
        ends += [lot["end"] for lot in self.lots if lot["available"] and lot["end"] is not None]
        return min(ends, default=None)

    def balance(self, now: datetime) -> Row:
        """Spendable, by source, set aside, owed, and what takes effect later; in micro-credits."""
        usable = [lot for lot in self.lots if not self.is_frozen(lot)]
        live = [lot for lot in usable if lot["available"] and lot["start"] <= now]
        sources = {lot["source"] for lot in live}
        return {
            "available": sum(lot["available"] for lot in live),
            "held": sum(lot["held"] for lot in self.lots),
            "debt": self.debt,
            "in_transit": sum(lot["in_transit"] for lot in self.lots),
            "upcoming": sum(lot["available"] for lot in usable if lot["start"] > now),
            "frozen": sum(lot["available"] for lot in self.lots if self.is_frozen(lot)),
            "by_source": {
                source: sum(lot["available"] for lot in live if lot["source"] == source) for source in sources
            },
        }


def burns_before(one: Row, other: Row) -> bool:
    """The documented order, step by step."""
    if one["priority"] != other["priority"]:
        return bool(one["priority"] < other["priority"])
    if (one["scope"] is None) != (other["scope"] is None):
        return one["scope"] is not None
    if one["end"] != other["end"]:
        if one["end"] is None:
            return False
        return other["end"] is None or bool(one["end"] < other["end"])
    if one["born"] != other["born"]:
        return bool(one["born"] < other["born"])
    return bool(one["number"] < other["number"])


def in_burn_down_order(lots: list[Row]) -> list[Row]:
    """Pick the lot that comes before all others, again and again."""
    left = list(lots)
    ordered = []
    while left:
        first = left[0]
        for lot in left[1:]:
            if burns_before(lot, first):
                first = lot
        left.remove(first)
        ordered.append(first)
    return ordered
