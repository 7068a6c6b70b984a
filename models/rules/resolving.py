"""What the known facts of a payment amount to: operations of the ledger (payments: from event to fact). Pure.

All that is known of one purchase, or of one subscription and what was paid for it, goes in together; what it amounts to
comes out. That depends on what is known and not on the order in which it was heard: where the ledger's own answer would
depend on an order, as with the periods of a subscription, a fact waits for the one before it, though not for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import msgspec

from creditlane.amounts import MICRO, format_amount
from creditlane.contract import MAX_NAME, MAX_TEXT
from models.rules.catalog import Catalog, Money, Sold, SoldGrant
from models.rules.facts import (
    PAYMENT_ALIASES,
    PURCHASE_ALIASES,
    DisputeChanged,
    Fact,
    Linked,
    PackPaid,
    PaymentFailed,
    PeriodPaid,
    RefundChanged,
    SubscriptionChanged,
)
from models.rules.payments import returned_minor
from models.rules.state import HALF_MONTH, PAYMENT_SLACK

PATIENCE_SECONDS = 3600
"""How long a fact waits for the one that it follows on, before it is applied without."""

TELLS_FIRST = frozenset({"stripe"})
"""Providers that say which payment of a subscription is its first: of theirs, any other follows on one."""

DAY_SECONDS = 86_400

TRIAL = "trial"
"""The source of a trial's credits."""

PACK = "grant:"
"""What the keys of effects begin with that give a pack's credits."""

Key = tuple[str, str]
"""A fact's kind and key."""


class Heard(NamedTuple):
    """A fact, and when it was first heard."""

    fact: Fact
    at: datetime

    @property
    def key(self) -> Key:
        """What it is known by."""
        return key_of(self.fact)


def key_of(fact: Fact) -> Key:
    """The kind and key of a fact."""
    return type(fact).__name__, fact.key


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What an administrator quoted: what is sold, for how much, to whom."""

    id: str
    account: str
    pack: str
    credits_micro: int
    price: Money


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """An operation of the ledger that facts amount to."""

    key: str
    """What makes it one."""
    name: str
    arguments: dict[str, Any]
    purchase: str | None = None
    order: str | None = None
    """The order of ours that it fulfils."""


class Verdict(msgspec.Struct, frozen=True):
    """What became of a fact."""

    status: Literal["applied", "noted", "waiting", "parked"]
    code: str | None = None
    reason: str | None = None
    until: datetime | None = None
    """When it has waited long enough."""


class Telling(msgspec.Struct, frozen=True):
    """A notice that is of no operation."""

    kind: str
    key: str
    at: datetime
    details: dict[str, Any]


class Resolution(msgspec.Struct, frozen=True):
    """What a group of facts amounts to."""

    account: str | None
    """Whose the group is; what was paid may say otherwise of itself."""
    effects: list[Effect]
    """Those that are to be sent, in order."""
    verdicts: dict[Key, Verdict]
    notices: list[Telling]
    missing: tuple[str, ...] = ()
    """Subscriptions of which a payment is waited for that was not heard of."""
    accounts: dict[Key, str] = {}
    """Whose a fact is, where that is known of itself."""


APPLIED, NOTED = Verdict("applied"), Verdict("noted")


def purchase_name(fact: PackPaid | PeriodPaid) -> str:
    """What the ledger calls a purchase: the provider, and its id of what was paid as one."""
    id = fact.key
    if isinstance(fact, PeriodPaid):
        named = {alias.kind: alias.id for alias in fact.aliases}
        id = next((named[kind] for kind in ("invoice", "sale", "transaction") if kind in named), fact.key)
    name = f"{fact.provider}:{id}"
    return name if len(name) <= MAX_NAME else f"{fact.provider}:sha256:{sha256(id.encode()).hexdigest()}"


def resolve(
    heard: Iterable[Heard],
    issued: Mapping[str, Mapping[str, Any]],
    now: datetime,
    catalog: Catalog,
    orders: Mapping[str, Order],
    bound: str | None = None,
    current: str | None = None,
) -> Resolution:
    """Say what a group of facts amounts to, beyond what was sent before.

    :param heard: all facts of the group.
    :param issued: the arguments of what was sent, by :attr:`Effect.key`, in the order of sending.
    :param now: an aware instant.
    :param orders: those that the facts name and that were quoted.
    :param bound: whose the group's customer or subscription is, where that is known otherwise.
    :param current: the :attr:`Effect.key` of the last payment for the account's plan, of whichever subscription.
    """
    return _Resolving(sorted(heard, key=_in_time), issued, now, catalog, orders, bound, current).resolve()


def _in_time(heard: Heard) -> tuple[datetime, Key]:
    return heard.fact.occurred_at, heard.key


class _Ending(NamedTuple):
    """What says whether a subscription goes on."""

    state: Heard | None
    changed: SubscriptionChanged | None
    known: Sequence[PeriodPaid]
    """Its periods that do not wait."""
    held: Verdict | None
    """Of the first that waits."""


class _Resolving:
    def __init__(
        self,
        heard: Sequence[Heard],
        issued: Mapping[str, Mapping[str, Any]],
        now: datetime,
        catalog: Catalog,
        orders: Mapping[str, Order],
        bound: str | None,
        current: str | None,
    ) -> None:
        self.heard = heard
        self.issued = dict(issued)
        self.now = now
        self.catalog = catalog
        self.orders = orders
        self.current = current
        self.effects: list[Effect] = []
        self.verdicts: dict[Key, Verdict] = {}
        self.accounts: dict[Key, str] = {}
        self.account = self._account(bound)
        self.owners: dict[str, str] = {}
        for arguments in issued.values():
            purchase = arguments.get("purchase") or arguments.get("payment")
            if purchase is not None:
                self.owners.setdefault(purchase, str(arguments["account"]))

    def _account(self, bound: str | None) -> str | None:
        """Whose it is: as it was before, else as what was paid says, else any of it, else as it is known otherwise."""
        for arguments in self.issued.values():
            return str(arguments["account"])
        paid = [self._account_of(each.fact) for each in self.heard if isinstance(each.fact, PackPaid | PeriodPaid)]
        any_of = [each.fact.account for each in self.heard]
        return next((account for account in (*paid, *any_of, bound) if account is not None), None)

    def _account_of(self, paid: PackPaid | PeriodPaid) -> str | None:
        """Whose a payment says that it is, or the order of ours that it names."""
        if paid.account is None and isinstance(paid, PackPaid) and paid.reference is not None:
            order = self.orders.get(paid.reference)
            return None if order is None else order.account
        return paid.account

    def _owner(self, paid: PackPaid | PeriodPaid) -> str:
        """Whose a payment is: whose it was before, else as it says, else as what it belongs to."""
        account = self.owners.get(purchase_name(paid)) or self._account_of(paid) or self.account
        assert account is not None
        return account

    def resolve(self) -> Resolution:
        """See :func:`resolve`."""
        for heard in self.heard:
            self.verdicts[heard.key] = NOTED
        if self.account is None:
            unknown = Verdict("waiting", "unknown_account", "no event of it has said whose it is")
            for heard in self.heard:
                if not isinstance(heard.fact, Linked | PaymentFailed):
                    self.verdicts[heard.key] = unknown
            return Resolution(None, [], self.verdicts, [])
        states = self._returned()
        for heard in self.heard:
            if isinstance(heard.fact, PackPaid | PeriodPaid):
                self.accounts[heard.key] = self._owner(heard.fact)
            if isinstance(heard.fact, PackPaid):
                self.verdicts[heard.key] = self._pack(heard.fact)
        subscriptions = {
            each.fact.subscription if isinstance(each.fact, PeriodPaid) else each.fact.key
            for each in self.heard
            if isinstance(each.fact, PeriodPaid | SubscriptionChanged)
        }
        endings = [self._subscription(subscription) for subscription in sorted(subscriptions)]
        for state in states.values():
            self._claw_back(state)
        for ending in endings:  # what was returned is taken before anything ends
            self._lifecycle(ending, states)
        return Resolution(self.account, self.effects, self.verdicts, self._notices(), self._missing(), self.accounts)

    def _missing(self) -> tuple[str, ...]:
        found = set()
        for heard in self.heard:
            if self.verdicts[heard.key].code in ("earlier_period", "no_period"):
                fact = heard.fact
                found.add(fact.subscription if isinstance(fact, PeriodPaid) else fact.key)
        return tuple(sorted(found))

    def _send(self, account: str, effect: Effect) -> None:
        """Add an operation on an account, once."""
        if effect.key not in self.issued:
            arguments = {"account": account, **effect.arguments}
            self.issued[effect.key] = arguments
            self.effects.append(msgspec.structs.replace(effect, arguments=arguments))

    # --- Packs ---------------------------------------------------------------------------------------

    def _pack(self, paid: PackPaid) -> Verdict:
        """Credits follow the price in the catalog, or an order of ours that the amount fits; never metadata alone."""
        if paid.reference is not None and paid.reference in self.orders:
            return self._order(paid, self.orders[paid.reference])
        if not paid.lines:
            return Verdict("parked", "unknown_order", f"it names the order {paid.reference!r}, which was never quoted")
        verdict = APPLIED
        for line in paid.lines:
            sold = self.catalog.sold_by(line.price)
            if sold is None or sold.kind != "pack":
                what = "no pack" if sold is None else "a plan and no pack"
                verdict = Verdict("parked", "unknown_price", f"the price {line.price!r} is of {what} in the catalog")
                continue
            amount = line.amount_minor
            if amount is None and len(paid.lines) == 1:
                amount = paid.paid_minor
            if line.quantity:
                self._grants(paid, line.price, sold.grants, line.quantity, amount)
        return verdict

    def _order(self, paid: PackPaid, order: Order) -> Verdict:
        owner = self._owner(paid)
        if order.account != owner:
            return Verdict("parked", "other_account", f"the order {order.id!r} is not of {owner!r}")
        if paid.currency != order.price.currency or paid.paid_minor < order.price.minor:
            return Verdict(
                "parked", "other_amount", f"{Money(paid.paid_minor, paid.currency)} was paid, not {order.price}"
            )
        pack = self.catalog.packs.get(order.pack)
        if pack is None:
            return Verdict("parked", "unknown_pack", f"the order is of {order.pack!r}, which the catalog has not")
        quoted = self.catalog.sold_by_quote(order.pack, order.credits_micro)
        lots = pack.lots if quoted is None else quoted.grants
        if sum(lot.credits_micro for lot in lots) != order.credits_micro:
            if len(lots) > 1:
                return Verdict("parked", "pack_changed", f"the bundle {order.pack!r} is another than was ordered")
            # What was ordered is given, whatever the pack has become.
            lots = (msgspec.structs.replace(lots[0], credits_micro=order.credits_micro),)
        self._grants(paid, order.id, lots, 1, paid.paid_minor, order.id)
        return APPLIED

    def _grants(
        self,
        paid: PackPaid,
        price: str,
        lots: Sequence[SoldGrant],
        quantity: int,
        amount_minor: int | None,
        order: str | None = None,
    ) -> None:
        """The grants of a pack; what was paid is shared by their credits, to the last minor unit."""
        total = sum(grant.credits_micro for grant in lots)
        given = spent = 0
        for number, grant in enumerate(lots):
            given += grant.credits_micro
            share = None
            if amount_minor is not None:
                share = amount_minor * given // total - spent
                spent += share
            self._grant(paid, f"{PACK}{paid.key}:{price}:{number}", grant, quantity, share, order)

    def _grant(
        self,
        paid: PackPaid,
        key: str,
        grant: SoldGrant,
        quantity: int,
        amount_minor: int | None,
        order: str | None = None,
    ) -> None:
        credits = grant.credits_micro * quantity
        purchase = purchase_name(paid)
        arguments: dict[str, Any] = {"amount": format_amount(credits), "source": grant.source, "purchase": purchase}
        if grant.priority is not None:
            arguments["priority"] = grant.priority
        if grant.features is not None:
            arguments["features"] = list(grant.features)
        if amount_minor is not None and amount_minor >= 0:
            arguments["unit_price"] = _unit_price(amount_minor, paid.currency, credits)
        if grant.expires_days is not None:
            arguments["expires_in"] = grant.expires_days * DAY_SECONDS  # from when it is given: late news cost no time
        effect = Effect(key=key, name="credits.grant", arguments=arguments, purchase=purchase, order=order)
        self._send(self._owner(paid), effect)

    # --- Subscriptions -------------------------------------------------------------------------------

    def _subscription(self, subscription: str) -> _Ending:
        """Its periods in the order of time; gives what says whether it goes on."""
        state = next(
            (
                each
                for each in self.heard
                if isinstance(each.fact, SubscriptionChanged) and each.fact.key == subscription
            ),
            None,
        )
        changed = state.fact if state is not None and isinstance(state.fact, SubscriptionChanged) else None
        periods = sorted(
            (
                (each, each.fact)
                for each in self.heard
                if isinstance(each.fact, PeriodPaid) and each.fact.subscription == subscription
            ),
            key=lambda pair: (start_of(pair[1]), pair[1].occurred_at, pair[1].key),
        )
        held: Verdict | None = None
        earlier: list[PeriodPaid] = []
        for heard, period in periods:
            verdict = self._period(heard, period, earlier, changed, held)
            self.verdicts[heard.key] = verdict
            if verdict.status == "waiting":
                held = held or verdict
            else:
                earlier.append(period)
        return _Ending(state, changed, earlier, held)

    def _wait(self, since: datetime, code: str, reason: str) -> Verdict | None:
        until = since + timedelta(seconds=PATIENCE_SECONDS)
        return Verdict("waiting", code, reason, until) if self.now < until else None

    def _period(
        self,
        heard: Heard,
        period: PeriodPaid,
        earlier: Sequence[PeriodPaid],
        changed: SubscriptionChanged | None,
        held: Verdict | None,
    ) -> Verdict:
        key = f"period:{period.key}"
        if key in self.issued:
            return APPLIED
        if held is not None:
            return Verdict("waiting", "earlier_period", "it comes after a period that waits itself", held.until)
        if period.provider in TELLS_FIRST and period.reason != "create" and not _follows(period, earlier):
            waits = self._wait(heard.at, "earlier_period", "the payment of the period before it was not heard of yet")
            if waits is not None:
                return waits
        trial = period.trial
        if trial is None:
            if changed is None:
                waits = self._wait(heard.at, "unknown_trial", "nothing was paid, and it is not known why yet")
                return waits or Verdict(
                    "parked", "unknown_trial", "nothing was paid, and the subscription was never heard of"
                )
            trial = changed.trial_end is not None and changed.trial_end > start_of(period)
        price = period.price
        if price is None and changed is not None and len(changed.items) == 1:
            price = changed.items[0].price
        if price is None:
            reason = "it does not say what was paid for, and the subscription was not heard of"
            return self._wait(heard.at, "unknown_price", reason) or Verdict("parked", "unknown_price", reason)
        sold = self.catalog.sold_by(price)
        if sold is None or sold.kind != "plan":
            what = "no plan" if sold is None else "a pack and no plan"
            return Verdict("parked", "unknown_price", f"the price {price!r} is of {what} in the catalog")
        if period.quantity != 1:
            return Verdict("parked", "quantity", f"a plan is sold once, and this is for {period.quantity}")
        purchase = purchase_name(period)
        others = [each for each in earlier if purchase_name(each) == purchase and f"period:{each.key}" in self.issued]
        if others:
            return Verdict("parked", "second_plan", "the same payment was for another plan, and an account has one")
        if trial:
            return self._trial(key, period, sold, purchase)
        self._send(self._owner(period), self._paid(key, period, sold, purchase, earlier))
        return APPLIED

    def _trial(self, key: str, period: PeriodPaid, sold: Sold, purchase: str) -> Verdict:
        """Only what the catalog says for a trial; the plan itself begins with the first payment."""
        credits = int(self.catalog.plans[sold.name].trial_credits)
        ends = period.period_end
        if not credits or (ends is not None and ends <= self.now):
            return NOTED
        arguments: dict[str, Any] = {"amount": format_amount(credits), "source": TRIAL, "purchase": purchase}
        arguments["unit_price"] = _unit_price(0, period.currency, credits)  # so that it is no purchase to a referral
        if ends is not None:
            arguments["expires_at"] = ends.isoformat()
        effect = Effect(key=key, name="credits.grant", arguments=arguments, purchase=purchase)
        self._send(self._owner(period), effect)
        return APPLIED

    def _paid(self, key: str, period: PeriodPaid, sold: Sold, purchase: str, earlier: Sequence[PeriodPaid]) -> Effect:
        arguments: dict[str, Any] = {
            "plan": sold.name,
            "payment": purchase,
            "period_start": start_of(period).isoformat(),
        }
        if period.period_end is not None and period.period_end > start_of(period):
            arguments["period_end"] = period.period_end.isoformat()
        owner = self._owner(period)
        if period.reason == "update" and any(not each.trial and self._owner(each) == owner for each in earlier):
            return Effect(key=key, name="plans.change", arguments=arguments, purchase=purchase)
        terms = self.catalog.terms_of(sold.name)
        assert terms is not None
        credits = terms.monthly_micro * terms.interval_months
        if period.amount_minor == 0 or (credits and period.amount_minor > 0):
            arguments["unit_price"] = _unit_price(period.amount_minor, period.currency, credits or MICRO)
        return Effect(key=key, name="plans.renew", arguments=arguments, purchase=purchase)

    def _lifecycle(self, ending: _Ending, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Whether the plan ends with what is paid for, at once if that was returned, or goes on; gives no credits."""
        if ending.state is not None and ending.changed is not None:
            self.verdicts[ending.state.key] = self._end(ending.state, ending.changed, ending.known, ending.held, states)

    def _end(
        self,
        state: Heard,
        changed: SubscriptionChanged,
        known: Sequence[PeriodPaid],
        held: Verdict | None,
        states: Mapping[str, Mapping[str, Any]],
    ) -> Verdict:
        sent = [key for key in self.issued if _is_of(key, changed.key)]
        paid = [period for period in known if _is_plan(self.issued.get(f"period:{period.key}"))]
        if held is not None:
            return Verdict("waiting", held.code, "a period before it waits", held.until)
        ends = changed.status == "canceled" or changed.ends_at is not None
        if not paid:
            if not ends:
                return NOTED
            return self._wait(state.at, "no_period", "no payment for it was heard of yet") or NOTED
        owner = self.accounts[state.key] = self._owner(paid[-1])
        if not ends:
            if sent and sent[-1].startswith("cancel:"):
                self._send(owner, self._resumed(changed, paid, len(sent)))
            return APPLIED
        unheard = any(
            item.period_start is not None
            and item.period_end is not None
            and not any(
                period.price in (None, item.price) and _overlaps(period, item.period_start, item.period_end)
                for period in known
            )
            for item in changed.items
        )
        if unheard:
            waits = self._wait(state.at, "earlier_period", "the payment of its last period was not heard of yet")
            if waits is not None:
                return waits
        last = next((effect.key for effect in reversed(self.effects) if _is_period(effect)), self.current)
        if last is not None and last not in {f"period:{period.key}" for period in paid}:
            return Verdict("noted", "other_subscription", "another subscription paid for the account's plan since")
        of_last = states.get(purchase_name(paid[-1]))
        returned = of_last is not None and 0 < of_last["paid_minor"] <= of_last["returned_minor"]
        at = "now" if returned and changed.is_final else "period_end"
        begins = f"cancel:{changed.key}:{len(paid)}:"
        if not sent or not sent[-1].startswith((f"{begins}{at}:", f"{begins}now:")):
            reason = f"{changed.provider}: the subscription ends"
            self._send(
                owner,
                Effect(key=f"{begins}{at}:{len(sent)}", name="plans.cancel", arguments={"at": at, "reason": reason}),
            )
        return APPLIED

    def _resumed(self, changed: SubscriptionChanged, paid: Sequence[PeriodPaid], number: int) -> Effect:
        """It was to end and goes on: said with its last payment, which no period is given for twice."""
        last = self.issued[f"period:{paid[-1].key}"]
        fields = ("plan", "payment", "period_start", "period_end")
        return Effect(
            key=f"resume:{changed.key}:{len(paid)}:{number}",
            name="plans.subscribe",
            arguments={field: last[field] for field in fields if field in last},
        )

    # --- Refunds and disputes ------------------------------------------------------------------------

    def _returned(self) -> dict[str, dict[str, Any]]:
        """Of each purchase what is away of its payment now; a fact whose purchase is not known waits for it."""
        returned: dict[str, list[Heard]] = {}
        paid_for: dict[str, list[PackPaid | PeriodPaid]] = {}
        for facts in _joined(self.heard):
            paid = [each.fact for each in facts if isinstance(each.fact, PackPaid | PeriodPaid)]
            for each in facts:
                if not isinstance(each.fact, RefundChanged | DisputeChanged):
                    continue
                of: dict[str, list[PackPaid | PeriodPaid]] = {}
                for payment in paid:
                    if not _contradicts(each.fact, payment):
                        of.setdefault(purchase_name(payment), []).append(payment)
                self.verdicts[each.key] = self._of(each.fact, of)
                if self.verdicts[each.key] is APPLIED:
                    for purchase, payments in of.items():
                        returned.setdefault(purchase, []).append(each)
                        paid_for[purchase] = payments
                        self.accounts[each.key] = self._owner(payments[0])
        return {purchase: self._state(purchase, paid_for[purchase], each) for purchase, each in returned.items()}

    @staticmethod
    def _of(fact: RefundChanged | DisputeChanged, purchases: Iterable[str]) -> Verdict:
        """Whether it can be said what a refund or dispute takes of the purchases that it may be of."""
        names = sorted(purchases)
        if not names:
            return Verdict("waiting", "no_purchase", "what it is a refund or dispute of was not heard of yet")
        if len(names) > 1 and fact.returned.amount_minor:
            reason = f"it may be of each of {', '.join(names)}: revoke by hand"
            return Verdict("parked", "ambiguous", reason[:MAX_TEXT])
        return APPLIED

    def _state(self, purchase: str, paid: Sequence[PackPaid | PeriodPaid], returns: Sequence[Heard]) -> dict[str, Any]:
        currency = paid[0].currency
        amounts = [each.paid_minor for each in paid]
        told = []
        disputes: dict[str, bool] = {}
        for each in returns:
            fact = each.fact
            assert isinstance(fact, RefundChanged | DisputeChanged)
            if fact.currency != currency:
                self.verdicts[each.key] = Verdict(
                    "parked", "other_currency", f"{fact.currency} of a payment in {currency}: revoke by hand"
                )
                continue
            told.append(fact.returned)
            if fact.paid_minor is not None:
                amounts.append(fact.paid_minor)
            if isinstance(fact, DisputeChanged):
                is_open = fact.is_open and fact.stage != "closed"
                disputes[fact.dispute] = is_open and disputes.get(fact.dispute, True)
        return {
            "account": self._owner(paid[0]),
            "purchase": purchase,
            "paid_minor": max(amounts),
            "returned_minor": returned_minor(told),
            "frozen": any(disputes.values()),
            "currency": currency,
        }

    def _claw_back(self, state: Mapping[str, Any]) -> None:
        """Tell the ledger how much of a purchase is away, where that is not what it was told last."""
        purchase = state["purchase"]
        before = [arguments for key, arguments in self.issued.items() if key.startswith(f"claw_back:{purchase}:")]
        if before:
            same = all(before[-1].get(name) == value for name, value in state.items())
        else:
            same = not state["returned_minor"] and not state["frozen"]
        if not same:
            step = len(before) + 1
            self._send(
                state["account"],
                Effect(
                    key=f"claw_back:{purchase}:{step}",
                    name="credits.claw_back",
                    arguments={**state, "step": step},
                    purchase=purchase,
                ),
            )

    def _notices(self) -> list[Telling]:
        """Payments that did not come about; of what did, the ledger's operations tell."""
        told = []
        for heard in self.heard:
            fact = heard.fact
            if not isinstance(fact, PaymentFailed):
                continue
            details: dict[str, Any] = {"action_required": fact.action_required}
            if fact.currency is not None and fact.amount_minor is not None:
                details["amount"] = str(Money(fact.amount_minor, fact.currency))
            if fact.next_attempt_at is not None:
                details["next_attempt_at"] = fact.next_attempt_at.isoformat()
            plans = [arguments["plan"] for arguments in self.issued.values() if "plan" in arguments]
            if plans:
                details["plan"] = plans[-1]
            told.append(
                Telling("payment_failed", f"payment_failed:{fact.provider}:{fact.key}", fact.occurred_at, details)
            )
        return told


def start_of(period: PeriodPaid) -> datetime:
    """When what was paid for begins; with the payment, where the provider does not say."""
    return period.occurred_at if period.period_start is None else period.period_start


def _follows(period: PeriodPaid, earlier: Sequence[PeriodPaid]) -> bool:
    """Whether the period is known that ends where this one begins, or that a change of plan was made in."""
    start = start_of(period)
    if period.reason != "update":
        return any(_covers(each, start) and _ends(each, start) for each in earlier)
    before = {line.price for line in period.credited}
    return any(_is_amid(each, start) and (not before or each.price in before) for each in earlier)


def _is_amid(period: PeriodPaid, at: datetime) -> bool:
    """Without slack: what was paid a day before may be of the period before."""
    return start_of(period) <= at and (period.period_end is None or at < period.period_end)


def _ends(period: PeriodPaid, at: datetime) -> bool:
    return period.period_end is None or period.period_end <= at + HALF_MONTH


def _covers(period: PeriodPaid, at: datetime) -> bool:
    end = start_of(period) if period.period_end is None else period.period_end
    return start_of(period) - PAYMENT_SLACK <= at <= end + PAYMENT_SLACK


def _overlaps(period: PeriodPaid, start: datetime, end: datetime) -> bool:
    return start_of(period) < end and (period.period_end is None or start < period.period_end)


def _is_of(key: str, subscription: str) -> bool:
    return key.startswith((f"cancel:{subscription}:", f"resume:{subscription}:"))


def _is_period(effect: Effect) -> bool:
    return effect.key.startswith("period:") and _is_plan(effect.arguments)


def _is_plan(arguments: Mapping[str, Any] | None) -> bool:
    return arguments is not None and "plan" in arguments


def _unit_price(minor: int, currency: str, credits_micro: int) -> dict[str, Any]:
    return {"minor": minor, "currency": currency, "per": format_amount(credits_micro)}


def _contradicts(returned: RefundChanged | DisputeChanged, paid: PackPaid | PeriodPaid) -> bool:
    """Whether what gave money back names another payment than this one: they have but an order in common."""
    own = {alias for alias in paid.aliases if alias.kind in PAYMENT_ALIASES}
    named = {alias for alias in returned.aliases if alias.kind in PAYMENT_ALIASES}
    return not own & named and bool({alias.kind for alias in own} & {alias.kind for alias in named})


def _joined(heard: Sequence[Heard]) -> list[list[Heard]]:
    """Facts that have an id of a purchase in common, directly or by way of others."""
    roots: dict[Any, Any] = {}

    def root(node: Any) -> Any:
        roots.setdefault(node, node)
        while roots[node] != node:
            roots[node] = node = roots[roots[node]]
        return node

    for each in heard:
        for alias in each.fact.aliases:
            if alias.kind in PURCHASE_ALIASES:
                roots[root(each.key)] = root(alias)
    joined: dict[Any, list[Heard]] = {}
    for each in heard:
        joined.setdefault(root(each.key), []).append(each)
    return list(joined.values())
