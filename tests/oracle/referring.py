"""The second ledger with referrals: what the design says of them, written once more, slow and obvious.

It is one account, so it is told whose each code is; who has which was settled before anybody claims one.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from tests.oracle.model import Refusal, Row, fingerprint
from tests.oracle.plans import PlanLedger


def rewarding(referrer: str, referee: str) -> str:
    """The id of what the ledger sends itself because of a referral."""
    return f"referral.reward:{fingerprint(referrer, referee)}"


class ReferringLedger(PlanLedger):
    """One account that refers others, or was referred.

    :param policy: also has ``referrals``: the catalog's words, with ``referrer`` and ``referee`` in micro-credits.
    :param owners: whose each code is.
    """

    def __init__(self, policy: Row, owners: dict[str, str]) -> None:
        super().__init__(policy)
        self.owners = owners
        self.referral_terms: Row = policy.get("referrals", {})
        self.kind = "user"
        self.born: datetime | None = None
        self.own_code: str | None = None
        self.claimed: Row | None = None
        self.rewards: list[tuple[str, datetime]] = []

    def open_(self, said: Row, operation: str, now: datetime) -> Row:
        details = super().open_(said, operation, now)
        self.kind, self.born = said.get("kind", "user"), now
        if "referral_code" in said:
            try:
                details = self.together(details, self.claim_code(said, operation, now))
            except Refusal as refusal:
                details = {**details, "referral": refusal.code}
        return details

    def grant_(self, said: Row, operation: str, now: datetime) -> Row:
        details = super().grant_(said, operation, now)
        free = "unit_price" in said and said["unit_price"]["minor"] == 0
        if "purchase" in said and not free and self.claimed is not None and not self.claimed["settled"]:
            details = self.together(details, self.settle_claim(said, operation, now))
        return details

    def referral_issue_(self, said: Row, operation: str, now: datetime) -> Row:
        if self.kind == "lead":
            raise Refusal("invalid")
        if self.own_code is None:
            if self.owners.get(said["code"]) != said["account"]:
                raise Refusal("code_exists")
            self.own_code = said["code"]
        return {"referral_code": self.own_code}

    def referral_claim_(self, said: Row, operation: str, now: datetime) -> Row:
        return self.claim_code({**said, "referral_code": said["code"]}, operation, now)

    def claim_code(self, said: Row, operation: str, now: datetime) -> Row:
        owner = self.owners.get(said["referral_code"])
        assert self.born is not None
        if self.kind != "user":
            raise Refusal("invalid")
        if owner is None:
            raise Refusal("code_unknown")
        days = self.referral_terms.get("claim_days")
        if days is not None and now - self.born >= timedelta(days=days):
            raise Refusal("code_expired")
        if owner == said["account"] or any(referee == owner for referee, _ in self.rewards):
            raise Refusal("self_referral")
        if self.claimed is not None:
            raise Refusal("already_referred")
        self.claimed = {"owner": owner, "code": said["referral_code"], "settled": False}
        details: Row = {"referral": "claimed", "referrer": owner}
        if self.referral_terms.get("trigger", "sign_up") == "sign_up":
            details = self.together(details, self.settle_claim(said, operation, now))
        return details

    def settle_claim(self, said: Row, operation: str, now: datetime) -> Row:
        assert self.claimed is not None
        self.claimed["settled"] = True
        owner = self.claimed["owner"]
        letter = {"account": owner, "referee": said["account"], "code": self.claimed["code"]}
        self.letters.append(("referrals.reward", rewarding(owner, said["account"]), letter))
        return {"referrer": owner, **self.bonus(self.referral_terms.get("referee", 0), operation, now)}

    def referral_reward_(self, said: Row, operation: str, now: datetime) -> Row:
        if operation != rewarding(said["account"], said["referee"]):
            raise Refusal("invalid")
        if self.own_code != said["code"]:
            raise Refusal("code_unknown")
        if self.claimed is not None and self.claimed["owner"] == said["referee"]:
            raise Refusal("self_referral")
        most, a_day = self.referral_terms.get("per_referrer"), self.referral_terms.get("per_day")
        zone = ZoneInfo(self.policy["zone"])
        today = [at for _, at in self.rewards if at.astimezone(zone).date() == now.astimezone(zone).date()]
        if most is not None and len(self.rewards) >= most:
            raise Refusal("limit_reached")
        if a_day is not None and len(today) >= a_day:
            raise Refusal("daily_limit")
        self.rewards.append((said["referee"], now))
        return {"referee": said["referee"], **self.bonus(self.referral_terms.get("referrer", 0), operation, now)}

    def bonus(self, amount: int, operation: str, now: datetime) -> Row:
        """A lot of credits that a referral brings."""
        if not amount:
            return {}
        days = self.referral_terms.get("expires_days")
        end = None if days is None else now + timedelta(days=days)
        lot = self.add_lot(operation, now, self.referral_terms.get("source", "referral"), end=end)
        self.come_in(lot, amount, operation, now)
        return {"uses": [(lot["number"], amount)], "bonus": amount}

    @staticmethod
    def together(one: Row, other: Row) -> Row:
        """Two answers as one."""
        uses: list[Any] = [*one.get("uses", []), *other.get("uses", [])]
        return {**one, **other, "uses": uses}
