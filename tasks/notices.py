"""Which notices follow from an operation and from the time that passed before it (schedules: notices). Pure.

They are rows written with the operation; how they go out is none of its business.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from creditlane.amounts import format_amount, parse_amount
from creditlane.codes import Code
from creditlane.contract import CancelPlan, ChangePlan, ClawBack, Grant, Message, Receive, RedeemCode, Refund
from models.rules.catalog import Catalog
from models.rules.state import Account, Entry, Notice
from tasks.achievements import Reached
from tasks.operation import Outcome

LOW_BALANCE, DEPLETED, EXPIRING = "low_balance", "depleted", "expiring"


class Told:
    """What an account is told of because of one operation.

    :param account: before anything of it, its settling included.
    :param now: the instant of the operation.
    """

    def __init__(self, account: Account, now: datetime, catalog: Catalog) -> None:
        self._account = account
        self._now = now
        self._notify = catalog.notify
        self._watches = bool(self._notify.low_balance) or DEPLETED in self._notify.kinds
        last = account.updated_at
        self._before = account.spendable(last) if self._watches and last is not None else 0
        self._reference = account.reference
        self._settled = self._before
        self._entries = len(account.entries)
        self._renewals = 0
        subscription = account.subscription
        self._had_plan = subscription is not None and subscription.is_active

    def settled(self) -> None:
        """Time has passed."""
        account = self._account
        if self._watches:
            self._settled = account.spendable(self._now)
        self._reference = account.reference  # another one, where a renewal brought credits in
        entries = account.entries[self._entries :]
        renewed = {taken.grant for renewal in account.renewals for taken in renewal.taken}
        self._expired(entry for entry in entries if entry.kind == "expired" and entry.grant not in renewed)
        self._renewed()
        subscription = account.subscription
        if subscription is not None and self._had_plan and not subscription.is_active:
            self._had_plan = False
            at = subscription.ended_at or self._now
            self._tell("plan_ended", f"plan_ended:{at.isoformat()}", at, plan=subscription.terms.plan)

    def applied(self, message: Message, operation: str, code: str | None, outcome: Outcome) -> None:
        """The operation is applied, or refused with a code."""
        if code is None:
            self._operation(message, operation, outcome)
            self._renewed()
        self._member(code, outcome.details or {})
        if self._watches and self._account.converted_to is None:
            self._balance(self._account.spendable(self._now))

    def achieved(self, reached: Iterable[Reached]) -> None:
        """The operation brought achievements."""
        for name, achievement, _ in reached:
            self._tell(
                "achievement", f"achievement:{name}", self._now, achievement=name, title=achievement.title or name,
                amount=format_amount(achievement.credits),
            )  # fmt: skip

    def _operation(self, message: Message, operation: str, outcome: Outcome) -> None:
        now = self._now
        subscription = self._account.subscription
        details = outcome.details or {}
        if "bonus" in details:
            other = {side: details[side] for side in ("referrer", "referee") if side in details}
            self._tell("referral_bonus", f"referral_bonus:{operation}", now, amount=details["bonus"], **other)
        plan = {key: value for key, value in details.items() if key.startswith(("plan", "period_", "allotted"))}
        if isinstance(message, Grant) and message.purchase is not None:
            self._tell("pack_bought", f"pack_bought:{operation}", now, amount=format_amount(message.amount),
                       source=message.source, purchase=message.purchase)  # fmt: skip
        elif isinstance(message, Receive):
            if message.from_lead:
                return  # nobody gave it
            amount = format_amount(sum(lot.amount for lot in message.lots))
            self._tell("gift_received", f"gift_received:{operation}", now, amount=amount, sender=message.sender,
                       **({} if message.message is None else {"message": message.message}))  # fmt: skip
        elif isinstance(message, RedeemCode):
            told = {name: details[name] for name in ("sender", "message") if name in details}
            self._tell("gift_received", f"gift_received:{operation}", now, amount=details["credits"], **told)
        elif isinstance(message, Refund):
            self._tell("refunded", f"refunded:{operation}", now, amount=format_amount(-outcome.charged),
                       charge=message.charge)  # fmt: skip
        elif isinstance(message, ClawBack):
            self._clawed_back(message.purchase, operation, outcome)
        elif subscription is not None and subscription.is_active and not self._had_plan:
            self._tell("plan_started", f"plan_started:{operation}", now, **plan)
        elif isinstance(message, ChangePlan):
            self._tell("plan_changed", f"plan_changed:{operation}", now, **plan)
        elif isinstance(message, CancelPlan):
            self._tell("plan_cancelled", f"plan_cancelled:{operation}", now, **plan)

    def _member(self, code: str | None, details: dict[str, Any]) -> None:
        """A member of a pool has used what it may, or wanted more than that: once in a period, whatever comes then."""
        allowance = details.get("allowance")
        if code == Code.MEMBER_LIMIT:
            reached = details
        elif allowance is not None and allowance.get("left") == "0":
            reached = allowance
        else:
            return
        told = {name: reached[name] for name in ("member", "limit", "period_end") if name in reached}
        until = told["period_end"].isoformat() if "period_end" in told else "total"
        self._tell("member_limit", f"member_limit:{until}:{told['member']}", self._now, **told)

    def _clawed_back(self, purchase: str, operation: str, outcome: Outcome) -> None:
        """What was taken with a refund, what is owed of it included; and that a dispute began or ended."""
        details = outcome.details or {}
        taken = max(0, outcome.charged) + parse_amount(details.get("owed", "0"))
        if taken:
            owed = {"owed": details["owed"]} if "owed" in details else {}
            self._tell("refunded", f"refunded:{operation}", self._now, amount=format_amount(taken), purchase=purchase,
                       **owed)  # fmt: skip
        for state in ("frozen", "thawed"):
            if state in details:
                self._tell(f"purchase_{state}", f"purchase_{state}:{operation}", self._now, amount=details[state],
                           purchase=purchase)  # fmt: skip

    def _renewed(self) -> None:
        """Periods that began since the last call."""
        renewals = self._account.renewals[self._renewals :]
        self._renewals += len(renewals)
        for renewal in renewals:
            self._tell(
                "period_renewed",
                f"period_renewed:{renewal.period_start.isoformat()}",
                renewal.at,
                plan=renewal.plan,
                allotted=format_amount(renewal.allotted),
                rolled_over=format_amount(renewal.rolled),
                expired=format_amount(renewal.expired),
            )

    def _expired(self, entries: Iterable[Entry]) -> None:
        """Lots that ended, all of one instant together."""
        amounts: dict[datetime, int] = {}
        for entry in entries:
            amounts[entry.at] = amounts.get(entry.at, 0) + entry.amount_micro
        for at, amount in amounts.items():
            self._tell("credits_expired", f"credits_expired:{at.isoformat()}", at, amount=format_amount(amount))

    def _balance(self, after: int) -> None:
        """A threshold is crossed from above to it or below: the lowest one, once; and the end of all credits."""
        account = self._account
        crossed: list[int] = []
        for start, stop, reference in (
            (self._before, self._settled, self._reference),
            (self._settled, after, account.reference),
        ):
            if stop < start:
                crossed += [limit for limit in self._notify.thresholds(reference) if stop <= limit < start]
        number = account.operations
        crossed = [limit for limit in crossed if after <= limit]
        if not after and max(self._before, self._settled) and DEPLETED in self._notify.kinds:
            self._add(DEPLETED, f"{DEPLETED}:{number}", self._now)
        elif crossed:
            self._add(
                LOW_BALANCE,
                f"{LOW_BALANCE}:{number}",
                self._now,
                available=format_amount(after),
                threshold=format_amount(min(crossed)),
                reference=format_amount(account.reference),
            )

    def _tell(self, kind: str, key: str, at: datetime, **details: Any) -> None:
        if kind in self._notify.kinds:
            self._add(kind, key, at, **details)

    def _add(self, kind: str, key: str, at: datetime, **details: Any) -> None:
        self._account.notices.append(Notice(kind, key, at, details))
