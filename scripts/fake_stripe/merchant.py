"""A merchant of the fake Stripe: what it sells and has sold, and what happens to it.

Each act changes objects and makes the events that Stripe makes of it, with the object as it is at that time.
"""

from __future__ import annotations

import calendar
import copy
import random
import string
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

from scripts.fake_stripe import objects
from scripts.fake_stripe.forms import RefusedError
from scripts.fake_stripe.objects import Json

DISPUTE_FEE = 1500
RETRY_SECONDS = 3 * 86400
"""How long after a failed payment of an invoice the next attempt is announced for."""

Outcome = Literal["succeeded", "pending", "failed", "requires_action"]
"""What comes of an attempt to collect a payment; the last one leaves it to the customer to confirm it."""

_PREFIXES = {
    "balance_transaction": "txn_", "billing_portal.session": "bps_", "charge": "ch_", "checkout.session": "cs_test_",
    "customer": "cus_", "dispute": "du_", "event": "evt_", "invoice": "in_", "invoice_item": "ii_",
    "invoice_line": "il_", "invoice_payment": "inpay_", "line_item": "li_", "payment_intent": "pi_", "price": "price_",
    "product": "prod_", "refund": "re_", "subscription": "sub_", "subscription_item": "si_",
}  # fmt: skip

_LISTS = {
    "invoice": (("lines", "/v1/invoices/{id}/lines"),),
    "subscription": (("items", "/v1/subscription_items?subscription={id}"),),
}
"""Lists that always stand within an object."""

_INCLUDABLE = {
    "checkout.session": ("line_items", "/v1/checkout/sessions/{id}/line_items"),
    "invoice": ("payments", "/v1/invoices/payments"),
    "charge": ("refunds", "/v1/charges/{id}/refunds"),
}
"""Lists that stand within an object only where they are asked for."""


def stepped(anchor: int, interval: str, steps: int) -> int:
    """So many intervals after an instant; in a shorter month the last day."""
    at = datetime.fromtimestamp(anchor, UTC)
    if interval in ("day", "week"):
        return int((at + timedelta(days=steps * (7 if interval == "week" else 1))).timestamp())
    months = at.year * 12 + at.month - 1 + steps * (12 if interval == "year" else 1)
    year, month = divmod(months, 12)
    day = min(at.day, calendar.monthrange(year, month + 1)[1])
    return int(at.replace(year=year, month=month + 1, day=day).timestamp())


def period_end(anchor: int, start: int, recurring: Mapping[str, Any]) -> int:
    """When a period that begins at ``start`` ends, of a subscription with this billing anchor."""
    steps = 1
    while (end := stepped(anchor, recurring["interval"], steps * recurring["interval_count"])) <= start:
        steps += 1
    return end


class Merchant:
    """What is sold, was sold, and the events of it.

    :param now: the clock; months are played by moving it.
    :param rng: what the ids are made of, so that a seed gives the same ones again.
    :param page: the most that stands in one page of any list, whatever limit is asked for.
    """

    def __init__(self, now: Callable[[], datetime], rng: random.Random, *, livemode: bool = False,
                 page: int = 100) -> None:  # fmt: skip
        self.lock = threading.RLock()
        self.livemode = livemode
        self.page = page
        self.base = "https://checkout.example.invalid"
        self._now = now
        self._letters = random.Random(rng.getrandbits(64))  # noqa: S311 - ids of a fake
        self._store: dict[str, dict[str, Json]] = {}
        self._by_id: dict[str, Json] = {}
        self._within: dict[tuple[str, str], list[Json]] = {}
        self._coupons: dict[str, Json] = {}
        self._plans: dict[str, tuple[Mapping[str, Any], Mapping[str, str]]] = {}
        self._prorations: dict[str, list[Json]] = {}
        self._is_silent = False

    # What is looked up

    def now(self) -> int:
        """The time, in seconds since 1970."""
        return int(self._now().timestamp())

    def all_of(self, kind: str) -> list[Json]:
        """The objects of a kind, the newest first, as they are stored."""
        with self.lock:
            return list(reversed(self._store.get(kind, {}).values()))

    def find(self, kind: str, id: str, param: str = "id", *, status: int = 404) -> Json:
        """An object, as it is stored.

        :raises RefusedError: when there is none.
        """
        found = self._store.get(kind, {}).get(id)
        if found is None:
            named = kind.replace(".", " ").replace("_", " ")
            raise RefusedError(status, f"No such {named}: {id!r}", code="resource_missing", param=param)
        return found

    def within(self, id: str, name: str) -> list[Json]:
        """A whole list of an object: ``lines`` of an invoice, ``payments``, ``items`` of a subscription."""
        return self._within.setdefault((id, name), [])

    def shown(self, object: Json, expand: Sequence[str] = ()) -> Json:
        """An object as it is answered.

        :param expand: paths of what is to stand within it, such as ``latest_invoice.payments``.
        :raises RefusedError: for a path that cannot be expanded.
        """
        with self.lock:
            shown = copy.deepcopy(object)
            for name, url in _LISTS.get(object["object"], ()):
                shown[name] = self._inlined(object["id"], name, url, counted=True)
            for path in expand:
                self.expand(shown, path.split("."))
            return shown

    def fetch(self, kind: str, id: str) -> Json:
        """An object with its lists complete, as adapters fetch it, but without HTTP.

        :param kind: such as ``checkout.session``.
        :raises RefusedError: when there is none.
        """
        with self.lock:
            includable = _INCLUDABLE.get(kind)
            whole = self.shown(self.find(kind, id), (includable[0],) if includable else ())
            for name, value in whole.items():
                if isinstance(value, dict) and value.get("object") == "list":
                    value |= {"data": [self.shown(each) for each in self.within(id, name)], "has_more": False}
            return whole

    def _inlined(self, id: str, name: str, url: str, *, counted: bool = False) -> Json:
        members = self.within(id, name)
        most = min(10, self.page)
        return objects.listed(
            [self.shown(each) for each in members[:most]],
            url.format(id=id),
            has_more=len(members) > most,
            total=len(members) if counted else None,
        )

    def expand(self, value: Any, path: Sequence[str]) -> None:
        """Put what a path names within a value that is about to be answered."""
        if len(path) > 4:
            raise RefusedError(400, "You cannot expand more than 4 levels of a property")
        if not path or value is None:
            return
        if isinstance(value, list):
            for each in value:
                self.expand(each, path)
            return
        name, held = path[0], value.get(path[0])
        includable, url = _INCLUDABLE.get(value.get("object"), ("", ""))
        if name == includable and name not in value:
            value[name] = self._inlined(value["id"], name, url, counted=name == "refunds")
        elif isinstance(held, str) and held in self._by_id:
            value[name] = self.shown(self._by_id[held])
        elif name not in value or isinstance(held, str | int):
            raise RefusedError(400, f"This property cannot be expanded ({'.'.join(path)}).", param="expand")
        self.expand(value[name], path[1:])

    def _new(self, kind: str, size: int = 24) -> str:
        return _PREFIXES[kind] + "".join(self._letters.choices(string.ascii_letters + string.digits, k=size))

    def _keep(self, object: Json) -> Json:
        self._store.setdefault(object["object"], {})[object["id"]] = object
        self._by_id[object["id"]] = object
        return object

    def emit(self, type: str, object: Json, previous: Json | None = None) -> None:
        """Make an event of an object as it is now, but in silence."""
        if not self._is_silent:
            made = objects.event(self._new("event"), type, self.shown(object), previous, created=self.now(),
                                 livemode=self.livemode)  # fmt: skip
            self._keep(made)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """What happens within makes no events at all, as when Stripe fails to make them."""
        with self.lock:
            self._is_silent = True
            try:
                yield
            finally:
                self._is_silent = False

    # What is sold

    def add_price(self, id: str | None, amount: int, currency: str = "eur", interval: str | None = None, *,
                  count: int = 1, product: str | None = None) -> Json:  # fmt: skip
        """Put up a price.

        :param id: None for a new one.
        :param amount: of one, in Stripe's smallest units.
        :param interval: ``day``, ``week``, ``month`` or ``year`` of a subscription; None of what is sold once.
        """
        with self.lock:
            return self._keep(objects.price(
                id or self._new("price"), product=product or self._new("product", 14), amount=amount,
                currency=currency.lower(), created=self.now(), livemode=self.livemode, interval=interval, count=count,
            ))  # fmt: skip

    def add_coupon(self, id: str, percent_off: int, duration: Literal["once", "forever"] = "once") -> None:
        """Put up a coupon: so many percent off, the first invoice of a subscription or each."""
        self._coupons[id] = {"id": id, "percent_off": percent_off, "duration": duration}

    def add_customer(self, email: str | None = None, name: str | None = None,
                     metadata: Mapping[str, str] | None = None) -> Json:  # fmt: skip
        """Make a customer."""
        with self.lock:
            made = self._keep(objects.customer(self._new("customer", 14), created=self.now(), livemode=self.livemode,
                                               email=email, name=name, metadata=metadata or {}))  # fmt: skip
            self.emit("customer.created", made)
            return made

    def open_session(self, lines: Sequence[tuple[str, int]], *, mode: str, coupon: str | None = None,
                     invoice_creation: bool = False, expires_at: int | None = None,
                     subscription_data: Mapping[str, Any] | None = None,
                     payment_metadata: Mapping[str, str] | None = None, **given: Any) -> Json:  # fmt: skip
        """Open a checkout session.

        :param lines: prices and quantities.
        :param coupon: the id of one that was put up.
        :param subscription_data: ``metadata`` and ``trial_end`` of the subscription that comes of it.
        :param payment_metadata: of the payment that comes of it.
        :param given: fields of the session.
        :raises RefusedError: when a price or coupon is not known, or does not fit the mode.
        """
        with self.lock:
            if coupon is not None and coupon not in self._coupons:
                raise RefusedError(400, f"No such coupon: {coupon!r}", code="resource_missing",
                                   param="discounts[0][coupon]")  # fmt: skip
            made = []
            for index, (price, quantity) in enumerate(lines):
                priced = self.find("price", price, f"line_items[{index}][price]", status=400)
                if mode == "payment" and priced["recurring"]:
                    raise RefusedError(400, "You specified `payment` mode but passed a recurring price.")
                if mode == "subscription" and priced["recurring"] and given.get("currency") is None:
                    given["currency"] = priced["currency"]
                discount = priced["unit_amount"] * quantity * self._percent(coupon) // 100
                made.append(objects.line_item(self._new("line_item"), priced, quantity, discount, price))
            if mode == "subscription" and not any(line["price"]["recurring"] for line in made):
                raise RefusedError(400, "You must provide at least one recurring price in `subscription` mode.")
            if len({line["currency"] for line in made}) > 1:
                raise RefusedError(400, "All line items must have the same currency.")
            id = self._new("checkout.session", 58)
            session = self._keep(objects.session(
                id, created=self.now(), livemode=self.livemode, expires_at=expires_at or self.now() + 86400,
                lines=made, url=f"{self.base}/pay/{id}", invoice_creation=invoice_creation, mode=mode,
                **given | {"currency": made[0]["currency"] if made else None},
            ))  # fmt: skip
            if coupon is not None:
                session["discounts"] = [{"coupon": coupon, "promotion_code": None}]
            self._within[id, "line_items"] = made
            self._plans[id] = (subscription_data or {}, payment_metadata or {})
            return session

    def _percent(self, coupon: str | None, *, first: bool = True) -> int:
        held = self._coupons.get(coupon or "")
        return int(held["percent_off"]) if held and (first or held["duration"] == "forever") else 0

    # What customers do

    def complete(self, session: str, outcome: Outcome = "succeeded", *, email: str = "buyer@example.org") -> Json:
        """The customer goes through a checkout.

        :param outcome: ``pending`` for a payment that is settled later, by :meth:`settle`; with ``failed`` the session
            stays open.
        :returns: the session.
        :raises RefusedError: when it is not open.
        """
        with self.lock:
            object = self.find("checkout.session", session)
            if object["status"] != "open":
                raise RefusedError(400, f"The session is {object['status']}.", code="payment_intent_unexpected_state")
            if outcome == "failed":
                self._collect(self._intend(object["amount_total"], object["currency"], object["customer"], {}), outcome)
                return object
            object["customer_details"] = {"email": email, "name": None, "address": None, "phone": None,
                                          "business_name": None, "individual_name": None, "tax_exempt": "none",
                                          "tax_ids": []}  # fmt: skip
            wants_customer = object["mode"] == "subscription" or object["customer_creation"] == "always"
            if object["customer"] is None and wants_customer:
                object["customer"] = self.add_customer(email)["id"]
            subscription_data, payment_metadata = self._plans.pop(session)
            if object["mode"] == "subscription":
                self._subscribe(object, subscription_data, outcome)
            else:
                self._buy(object, payment_metadata, outcome)
            object.update(status="complete", url=None)
            self.emit("checkout.session.completed", object)
            return object

    def settle(self, session: str, outcome: Literal["succeeded", "failed"] = "succeeded") -> Json:
        """A payment that was on its way comes about, or fails."""
        with self.lock:
            object = self.find("checkout.session", session)
            if object["mode"] == "subscription":
                self._charge(self.find("invoice", object["invoice"]), outcome)
            else:
                self._collect(self.find("payment_intent", object["payment_intent"]), outcome)
            if outcome == "succeeded" and object["mode"] == "payment":
                self._bought(object)
            elif outcome == "succeeded":
                object["payment_status"] = "paid"
            self.emit(f"checkout.session.async_payment_{outcome}", object)
            return object

    def expire(self, session: str) -> Json:
        """Nobody goes through a checkout in time."""
        with self.lock:
            object = self.find("checkout.session", session)
            if object["status"] != "open":
                raise RefusedError(400, "Only Checkout Sessions with a status of open can be expired.")
            object.update(status="expired", url=None)
            self.emit("checkout.session.expired", object)
            return object

    def _buy(self, session: Json, metadata: Mapping[str, str], outcome: Outcome) -> None:
        if session["amount_total"] == 0:
            self._bought(session, "no_payment_required")
            return
        intent = self._intend(session["amount_total"], session["currency"], session["customer"], metadata)
        session["payment_intent"] = intent["id"]
        self._collect(intent, outcome)
        if outcome == "succeeded":
            self._bought(session)

    def _bought(self, session: Json, status: str = "paid") -> None:
        session["payment_status"] = status
        if not session["invoice_creation"]["enabled"]:
            return
        customer = session["customer"] and self.find("customer", session["customer"])
        invoice = self._draft(customer, session["currency"], "manual", session["total_details"]["amount_discount"],
                              (self.now(), self.now()))  # fmt: skip
        session["invoice"] = invoice["id"]
        for line in self.within(session["id"], "line_items"):
            self._line(invoice, line["price"], line["amount_subtotal"], line["quantity"], self.now(), self.now(),
                       line["description"], invoice_item=self._new("invoice_item"))  # fmt: skip
        self._finalize(invoice)
        if session["payment_intent"]:
            self.attach_payment(invoice["id"], session["payment_intent"])
        self._paid(invoice)

    def _subscribe(self, session: Json, data: Mapping[str, Any], outcome: Outcome) -> None:
        start, trial_end = self.now(), data.get("trial_end")
        lines = self.within(session["id"], "line_items")
        made = self._keep(objects.subscription(
            self._new("subscription"), customer=session["customer"], currency=session["currency"], created=start,
            livemode=self.livemode, anchor=trial_end or start, trial_end=trial_end, metadata=data.get("metadata", {}),
            status="trialing" if trial_end else "incomplete",
        ))  # fmt: skip
        made["discounts"] = [each["coupon"] for each in session["discounts"]]
        for line in lines:
            recurring = line["price"]["recurring"]
            if recurring:
                end = trial_end or period_end(start, start, recurring)
                self.within(made["id"], "items").append(self._keep(objects.subscription_item(
                    self._new("subscription_item", 14), made["id"], line["price"], quantity=line["quantity"],
                    created=start, start=start, end=end,
                )))  # fmt: skip
        self._say_quantity(made)
        self.emit("customer.subscription.created", made)
        session.update(subscription=made["id"])
        once = [line for line in lines if not line["price"]["recurring"]]
        invoice = self._bill(made, "subscription_create", (start, start), once=once)
        due = invoice["amount_due"]
        status = "no_payment_required" if due == 0 else "paid" if outcome == "succeeded" else "unpaid"
        session.update(invoice=invoice["id"], amount_total=due, payment_status=status)
        self._charge(invoice, outcome)
        if not trial_end:
            self._change(made, status="active")

    def _say_quantity(self, subscription: Json) -> None:
        items = self.within(subscription["id"], "items")
        alone = items[0] if len(items) == 1 else None
        subscription.update(plan=alone and alone["plan"], quantity=alone and alone["quantity"])

    def _change(self, subscription: Json, **fields: Any) -> None:
        previous = {key: copy.deepcopy(subscription[key]) for key in fields}
        subscription.update(fields)
        self.emit("customer.subscription.updated", subscription, previous)

    def open_portal(self, customer: str, return_url: str | None) -> Json:
        """A page on which a customer sees and cancels what is subscribed to."""
        with self.lock:
            id = self._new("billing_portal.session")
            return {
                "id": id, "object": "billing_portal.session", "configuration": "bpc_fake", "created": self.now(),
                "customer": customer, "customer_account": None, "flow": None, "livemode": self.livemode, "locale": None,
                "on_behalf_of": None, "return_url": return_url, "url": f"{self.base}/portal/{id}",
            }  # fmt: skip

    # Payments

    def _intend(self, amount: int, currency: str, customer: str | None, metadata: Mapping[str, str],
                description: str | None = None, order: str | None = None) -> Json:  # fmt: skip
        intent = self._keep(objects.payment_intent(
            self._new("payment_intent"), amount=amount, currency=currency, customer=customer, created=self.now(),
            livemode=self.livemode, description=description, metadata=metadata, order=order,
        ))  # fmt: skip
        self.emit("payment_intent.created", intent)
        return intent

    def _collect(self, intent: Json, outcome: Outcome) -> None:
        """Let an attempt come to something; one that was pending, or a new one."""
        if outcome not in get_args(Outcome):
            raise ValueError(f"a payment does not come to {outcome!r}")
        if outcome == "requires_action":
            intent.update(status="requires_action", next_action={"type": "use_stripe_sdk", "use_stripe_sdk": {}})
            self.emit("payment_intent.requires_action", intent)
            return
        charge = self._by_id.get(intent["latest_charge"] or "")
        if charge is None or charge["status"] != "pending":
            charge = {"id": self._new("charge"), "created": self.now()}
        moved = outcome == "succeeded" and self._move(intent["amount"], intent["currency"], charge["id"], "charge")
        charge.update(objects.charge(charge["id"], intent, status=outcome, created=charge["created"],
                                     transaction=moved["id"] if moved else None))  # fmt: skip
        self._keep(charge)
        intent.update(latest_charge=charge["id"], next_action=None)
        if outcome == "pending":
            intent["status"] = "processing"
            self.emit("charge.pending", charge)
            self.emit("payment_intent.processing", intent)
        elif outcome == "succeeded":
            intent.update(status="succeeded", amount_received=intent["amount"], last_payment_error=None)
            self.emit("charge.succeeded", charge)
            self.emit("payment_intent.succeeded", intent)
        else:
            error = {"code": "card_declined", "decline_code": "generic_decline", "type": "card_error",
                     "charge": charge["id"], "message": "Your card was declined."}  # fmt: skip
            intent.update(status="requires_payment_method", last_payment_error=error)
            self.emit("charge.failed", charge)
            self.emit("payment_intent.payment_failed", intent)

    def _move(self, amount: int, currency: str, source: str, type: str, fee: int = 0) -> Json:
        return self._keep(objects.balance_transaction(
            self._new("balance_transaction"), amount=amount, fee=fee, currency=currency, created=self.now(),
            source=source, type=type,
        ))  # fmt: skip

    # Invoices

    def _draft(self, customer: Json | None, currency: str, reason: str, discount: int, period: tuple[int, int],
               subscription: Json | None = None) -> Json:  # fmt: skip
        count = len(self._store.get("invoice", {})) + 1
        balance = int(customer["balance"]) if customer else 0
        return self._keep(objects.invoice(
            self._new("invoice"), customer=customer, currency=currency, created=self.now(), livemode=self.livemode,
            reason=reason, number=f"FAKE-{count:04d}", subtotal=0, discount=discount, starting_balance=balance,
            period=period, subscription=subscription, metadata={},
        ))  # fmt: skip

    def _line(self, invoice: Json, priced: Json, amount: int, quantity: int, start: int, end: int, description: str,
              **details: Any) -> Json:  # fmt: skip
        line = objects.invoice_line(self._new("invoice_line"), invoice["id"], priced, amount=amount,
                                    quantity=quantity, start=start, end=end, description=description,
                                    livemode=self.livemode, **details)  # fmt: skip
        self.within(invoice["id"], "lines").append(line)
        return line

    def _finalize(self, invoice: Json) -> None:
        """Sum up a draft and make it due."""
        subtotal = sum(line["amount"] for line in self.within(invoice["id"], "lines"))
        discount = sum(each["amount"] for each in invoice["total_discount_amounts"])
        total, balance = subtotal - discount, invoice["starting_balance"]
        due = max(0, total + balance)
        invoice.update(subtotal=subtotal, subtotal_excluding_tax=subtotal, total=total, total_excluding_tax=total,
                       amount_due=due, amount_remaining=due)  # fmt: skip
        self.emit("invoice.created", invoice)
        left = min(0, total + balance)
        if invoice["customer"]:
            self.find("customer", invoice["customer"])["balance"] = left
        invoice.update(status="open", ending_balance=left, effective_at=self.now())
        invoice["status_transitions"]["finalized_at"] = self.now()
        self.emit("invoice.finalized", invoice)

    def attach_payment(self, invoice: str, intent: str) -> Json:
        """Let an invoice be paid by a payment; by the last one of several."""
        with self.lock:
            object = self.find("invoice", invoice)
            made = self._keep(objects.invoice_payment(self._new("invoice_payment"), object, intent, self.now()))
            self.within(invoice, "payments").insert(0, made)
            return made

    def _paid(self, invoice: Json) -> None:
        invoice.update(status="paid", amount_paid=invoice["amount_due"], amount_remaining=0, attempted=True,
                       auto_advance=False, next_payment_attempt=None)  # fmt: skip
        invoice["status_transitions"]["paid_at"] = self.now()
        self.emit("invoice.paid", invoice)
        self.emit("invoice.payment_succeeded", invoice)
        for payment in self.within(invoice["id"], "payments")[:1]:
            payment.update(status="paid", amount_paid=invoice["amount_paid"])
            payment["status_transitions"]["paid_at"] = self.now()
            self.emit("invoice_payment.paid", payment)

    def _charge(self, invoice: Json, outcome: Outcome) -> None:
        """Try to collect what an invoice comes to."""
        if invoice["amount_due"] == 0:
            self._paid(invoice)
            return
        payments = self.within(invoice["id"], "payments")
        if not payments:
            intent = self._intend(invoice["amount_due"], invoice["currency"], invoice["customer"], {},
                                  "Subscription", invoice["id"])  # fmt: skip
            self.attach_payment(invoice["id"], intent["id"])
        intent = self.find("payment_intent", payments[0]["payment"]["payment_intent"])
        invoice.update(attempt_count=invoice["attempt_count"] + 1, attempted=True)
        self._collect(intent, outcome)
        if outcome == "succeeded":
            self._paid(invoice)
        elif outcome == "requires_action":
            self.emit("invoice.payment_action_required", invoice)
        elif outcome == "failed":
            invoice["next_payment_attempt"] = self.now() + RETRY_SECONDS
            self.emit("invoice.payment_failed", invoice)

    def _bill(self, subscription: Json, reason: str, period: tuple[int, int], *, items: bool = True,
              prorations: Sequence[Json] = (), once: Sequence[Json] = ()) -> Json:  # fmt: skip
        """Make an invoice of the periods that the items of a subscription are in, and of what else is given."""
        first = reason == "subscription_create"
        percent = sum(self._percent(coupon, first=first) for coupon in subscription["discounts"])
        invoice = self._draft(self.find("customer", subscription["customer"]), subscription["currency"], reason, 0,
                              period, subscription)  # fmt: skip
        known = {"subscription": subscription["id"]}
        for proration in prorations:
            self._line(invoice, proration["price"], proration["amount"], proration["quantity"], proration["start"],
                       proration["end"], proration["description"], item=proration["item"], proration=True,
                       credited=proration["credited"], invoice_item=self._new("invoice_item"), **known)  # fmt: skip
        for item in self.within(subscription["id"], "items") if items else ():
            trial = subscription["status"] == "trialing"
            amount = 0 if trial else item["price"]["unit_amount"] * item["quantity"]
            name = f"Free trial for {item['price']['id']}" if trial else f"{item['quantity']} × {item['price']['id']}"
            self._line(invoice, item["price"], amount, item["quantity"], item["current_period_start"],
                       item["current_period_end"], name, item=item["id"], discount=amount * percent // 100,
                       **known)  # fmt: skip
        for line in once:
            amount = line["amount_subtotal"]
            self._line(invoice, line["price"], amount, line["quantity"], self.now(), self.now(), line["description"],
                       invoice_item=self._new("invoice_item"), discount=amount * percent // 100)  # fmt: skip
        off = sum(each["amount"] for line in self.within(invoice["id"], "lines") for each in line["discount_amounts"])
        invoice["total_discount_amounts"] = [{"amount": off, "discount": "di_fake"}] if off else []
        self._finalize(invoice)
        subscription["latest_invoice"] = invoice["id"]
        return invoice

    def pay(self, invoice: str, outcome: Outcome = "succeeded") -> Json:
        """Try again to collect an open invoice; when it is paid the subscription is active again."""
        with self.lock:
            object = self.find("invoice", invoice)
            if object["status"] != "open":
                raise RefusedError(400, "Invoice is already paid", code="invoice_not_editable")
            self._charge(object, outcome)
            if outcome == "succeeded" and object["parent"]:
                of = object["parent"]["subscription_details"]["subscription"]
                subscription = self.find("subscription", of)
                if subscription["status"] in ("past_due", "unpaid"):
                    self._change(subscription, status="active")
            return object

    # Subscriptions

    def live(self, subscription: str) -> Json:
        """A subscription that has not ended.

        :raises RefusedError: when it has.
        """
        object = self.find("subscription", subscription)
        if object["status"] in ("canceled", "incomplete_expired"):
            raise RefusedError(404, f"No such subscription: {subscription!r}", code="resource_missing", param="id")
        return object

    def renew(self, subscription: str, outcome: Outcome = "succeeded") -> Json:
        """A period ends: the next begins and is paid for, or the subscription ends where it was cancelled for then.

        The clock should stand at or after the end; nothing here waits for it.
        """
        with self.lock:
            object = self.live(subscription)
            items = self.within(subscription, "items")
            ends = items[0]["current_period_end"]
            if object["cancel_at_period_end"] or (object["cancel_at"] or ends + 1) <= ends:
                return self._end(object)
            past = (items[0]["current_period_start"], ends)
            previous = self.shown(object)["items"]
            for item in items:
                start = item["current_period_end"]
                end = period_end(object["billing_cycle_anchor"], start, item["price"]["recurring"])
                item.update(current_period_start=start, current_period_end=end)
            was = object["status"]
            object["status"] = "active" if was == "trialing" else was
            changed = {"items": previous} | ({"status": was} if was == "trialing" else {})
            self.emit("customer.subscription.updated", object, changed)
            invoice = self._bill(object, "subscription_cycle", past, prorations=self._prorations.pop(subscription, []))
            if object["pause_collection"]:
                if object["pause_collection"]["behavior"] == "void":
                    invoice.update(status="void")
                    self.emit("invoice.voided", invoice)
                return object
            self._charge(invoice, outcome)
            self._fall_due(object, invoice, outcome)
            return object

    def _fall_due(self, subscription: Json, invoice: Json, outcome: Outcome) -> None:
        """Note that an invoice was not paid; one that is on its way is."""
        if invoice["status"] == "open" and outcome != "pending" and subscription["status"] == "active":
            self._change(subscription, status="past_due")

    def change_plan(self, subscription: str, price: str, *, quantity: int | None = None,
                    proration: Literal["always_invoice", "create_prorations", "none"] = "always_invoice",
                    outcome: Outcome = "succeeded") -> Json:  # fmt: skip
        """Put another price into a subscription of one item.

        Another interval begins a period now and is billed at once; the same interval keeps its period, and is billed at
        once only with ``always_invoice``, else with the next period.
        """
        with self.lock:
            object, priced = self.live(subscription), self.find("price", price, "items[0][price]", status=400)
            (item,) = self.within(subscription, "items")
            before = self.shown(object)
            old, amount = item["price"], item["price"]["unit_amount"] * item["quantity"]
            start, end, now = item["current_period_start"], item["current_period_end"], self.now()
            had, quantity = item["quantity"], item["quantity"] if quantity is None else quantity
            if (price, quantity) == (old["id"], had):
                return object  # no change
            share = max(0, end - now) / (end - start)
            objects.repriced(item, priced, quantity)
            rhythm = ("interval", "interval_count")
            anew = any(priced["recurring"][key] != old["recurring"][key] for key in rhythm)
            is_trial = object["status"] == "trialing"
            if anew and not is_trial:
                object["billing_cycle_anchor"] = now
                item.update(current_period_start=now, current_period_end=period_end(now, now, priced["recurring"]))
            self._say_quantity(object)
            full = priced["unit_amount"] * quantity
            wanted = proration != "none" and not is_trial
            known = {"item": item["id"], "start": now}
            prorations = [
                known | {"price": old, "amount": -round(amount * share), "quantity": had, "end": end,
                         "credited": self._credited(object, item["id"]),
                         "description": f"Unused time on {old['id']}"},
                known | {"price": priced, "amount": full if anew else round(full * share), "quantity": quantity,
                         "end": item["current_period_end"], "credited": None,
                         "description": f"Remaining time on {priced['id']}"},
            ] if wanted else []  # fmt: skip
            changed = {key: before[key] for key in ("items", "plan", "quantity", "billing_cycle_anchor")
                       if before[key] != self.shown(object)[key]}  # fmt: skip
            self.emit("customer.subscription.updated", object, changed)
            if is_trial:
                return object
            if anew or (wanted and proration == "always_invoice"):
                invoice = self._bill(object, "subscription_update", (start, now), items=not wanted,
                                     prorations=prorations)  # fmt: skip
                self._charge(invoice, outcome)
                self._fall_due(object, invoice, outcome)
            elif wanted:
                self._prorations.setdefault(subscription, []).extend(prorations)
            return object

    def _credited(self, subscription: Json, item: str) -> Json | None:
        for invoice in self.all_of("invoice"):
            about = (invoice["parent"] or {}).get("subscription_details")
            if about and about["subscription"] == subscription["id"]:
                lines = [line["id"] for line in self.within(invoice["id"], "lines")
                         if line["amount"] >= 0 and line["parent"]["type"] == "subscription_item_details"
                         and line["parent"]["subscription_item_details"]["subscription_item"] == item]  # fmt: skip
                if lines:
                    return {"invoice": invoice["id"], "invoice_line_items": lines[-1:]}
        return None

    def remind_of_trial(self, subscription: str) -> Json:
        """Say that a trial ends soon, as three days before."""
        with self.lock:
            object = self.live(subscription)
            self.emit("customer.subscription.trial_will_end", object)
            return object

    def cancel(self, subscription: str, *, at_period_end: bool = False) -> Json:
        """Cancel a subscription, now or for the end of its period."""
        with self.lock:
            object = self.live(subscription)
            why = object["cancellation_details"] | {"reason": "cancellation_requested"}
            if at_period_end:
                end = max(item["current_period_end"] for item in self.within(subscription, "items"))
                self._change(object, cancel_at_period_end=True, cancel_at=end, canceled_at=self.now(),
                             cancellation_details=why)  # fmt: skip
                return object
            object["cancellation_details"] = why
            object["canceled_at"] = self.now()
            return self._end(object)

    def undo_cancel(self, subscription: str) -> Json:
        """Take back a cancellation for the end of the period."""
        with self.lock:
            object = self.live(subscription)
            self._change(object, cancel_at_period_end=False, cancel_at=None, canceled_at=None,
                         cancellation_details=object["cancellation_details"] | {"reason": None})  # fmt: skip
            return object

    def _end(self, subscription: Json) -> Json:
        subscription.update(status="canceled", ended_at=self.now(), cancel_at_period_end=False)
        self.emit("customer.subscription.deleted", subscription)
        return subscription

    def pause_collection(self, subscription: str, behavior: str | None = "void") -> Json:
        """Collect no payments of a subscription, or with None again."""
        with self.lock:
            paused = None if behavior is None else {"behavior": behavior, "resumes_at": None}
            object = self.live(subscription)
            self._change(object, pause_collection=paused)
            return object

    # Money that goes back

    def charge_of(self, id: str) -> Json:
        """The charge that a session, an invoice or a payment was paid by.

        :raises RefusedError: when there is none.
        """
        kind = next((kind for kind, held in self._store.items() if id in held), "charge")
        object = self.find(kind, id)
        if kind == "checkout.session":
            return self.charge_of(object["payment_intent"] or object["invoice"])
        if kind == "invoice":
            return self.charge_of(self.within(id, "payments")[0]["payment"]["payment_intent"])
        if kind == "payment_intent":
            return self.find("charge", object["latest_charge"])
        return object

    def refund(self, of: str, amount: int | None = None, outcome: Outcome = "succeeded", *,
               metadata: Mapping[str, str] | None = None, reason: str | None = None) -> Json:  # fmt: skip
        """Give back what a session, an invoice, a payment or a charge brought in, or a part of it.

        :param amount: None for all that is left.
        """
        with self.lock:
            charge = self.charge_of(of)
            left = charge["amount"] - charge["amount_refunded"]
            if left == 0:
                raise RefusedError(400, "Charge has already been refunded.", code="charge_already_refunded")
            amount = left if amount is None else amount
            if not 0 < amount <= left:
                raise RefusedError(400, f"Refund amount ({amount}) is not within what is left ({left})", param="amount")
            id = self._new("refund")
            moved = self._move(-amount, charge["currency"], id, "refund")
            made = self._keep(objects.refund(id, charge, amount=amount, status=outcome, created=self.now(),
                                             transaction=moved["id"], metadata=metadata or {},
                                             reason=reason))  # fmt: skip
            self.within(charge["id"], "refunds").insert(0, made)
            self._count_refunds(charge)
            self.emit("refund.created", made)
            self.emit("charge.refunded", charge)
            return made

    def _count_refunds(self, charge: Json) -> None:
        of = self.within(charge["id"], "refunds")
        back = sum(each["amount"] for each in of if each["status"] not in ("failed", "canceled"))
        charge.update(amount_refunded=back, refunded=back == charge["amount"])

    def change_refund(self, refund: str, status: Literal["succeeded", "failed", "canceled"]) -> Json:
        """A refund comes about, fails after all (even one that had succeeded), or is cancelled on its way."""
        with self.lock:
            object = self.find("refund", refund)
            previous = {"status": object["status"]}
            object["status"] = status
            if status != "succeeded":
                moved = self._move(object["amount"], object["currency"], refund, "refund_failure")
                object["failure_balance_transaction"] = moved["id"]
            if status == "failed":
                object["failure_reason"] = "expired_or_canceled_card"
                self.emit("refund.failed", object)
            self._count_refunds(self.find("charge", object["charge"]))
            self.emit("refund.updated", object, previous)
            self.emit("charge.refund.updated", object, previous)
            return object

    def refer_refund(self, refund: str) -> Json:
        """The acquirer gives a refund its reference: nothing else of it changes."""
        with self.lock:
            object = self.find("refund", refund)
            previous = {"destination_details": copy.deepcopy(object["destination_details"])}
            object["destination_details"]["card"] |= {"reference": "123456789012", "reference_status": "available"}
            self.emit("refund.updated", object, previous)
            self.emit("charge.refund.updated", object, previous)
            return object

    def dispute(self, of: str, amount: int | None = None, *, inquiry: bool = False, withdrawn: bool = True) -> Json:
        """A customer's bank asks back what a session, an invoice, a payment or a charge brought in.

        :param amount: None for all of it.
        :param inquiry: whether it only asks: no money moves.
        :param withdrawn: whether the money goes at once, else by :meth:`withdraw`.
        """
        with self.lock:
            charge = self.charge_of(of)
            made = self._keep(objects.dispute(
                self._new("dispute"), charge, amount=charge["amount"] if amount is None else amount,
                status="warning_needs_response" if inquiry else "needs_response", created=self.now(), reason="general",
            ))  # fmt: skip
            charge["disputed"] = True
            self.emit("charge.dispute.created", made)
            if withdrawn and not inquiry:
                self.withdraw(made["id"])
            return made

    def withdraw(self, dispute: str) -> Json:
        """The money of a dispute goes."""
        with self.lock:
            object = self.find("dispute", dispute)
            moved = self._move(-object["amount"], object["currency"], dispute, "adjustment", DISPUTE_FEE)
            object["balance_transactions"].append(moved)
            self.emit("charge.dispute.funds_withdrawn", object)
            return object

    def answer_dispute(self, dispute: str) -> Json:
        """The seller hands in evidence."""
        with self.lock:
            object = self.find("dispute", dispute)
            previous = {"status": object["status"]}
            object["status"] = object["status"].replace("needs_response", "under_review")
            self.emit("charge.dispute.updated", object, previous)
            return object

    def close_dispute(self, dispute: str, status: Literal["won", "lost", "warning_closed", "prevented"]) -> Json:
        """A dispute is decided; of one that is won the money comes back."""
        with self.lock:
            object = self.find("dispute", dispute)
            away = -sum(moved["amount"] for moved in object["balance_transactions"])
            object["status"] = status
            self.emit("charge.dispute.closed", object)
            if status == "won" and away:
                object["balance_transactions"].append(self._move(away, object["currency"], dispute, "adjustment"))
                self.emit("charge.dispute.funds_reinstated", object)
            return object
