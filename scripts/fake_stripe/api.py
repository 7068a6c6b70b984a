"""The fake Stripe's API: requests and answers as Stripe has them, without HTTP."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from scripts.fake_stripe import objects
from scripts.fake_stripe.forms import RefusedError, check_parameters, flag, metadata, whole
from scripts.fake_stripe.merchant import Merchant
from scripts.fake_stripe.objects import Json

EVENT_DAYS = 30
"""How long events are listed."""

SESSION_SECONDS = (1800, 86400)
"""How long a checkout session may be open, at least and at most."""

_KINDS = {
    "charges": ("charge", "ChargeListParams"),
    "checkout/sessions": ("checkout.session", "checkout.SessionListParams"),
    "customers": ("customer", "CustomerListParams"),
    "disputes": ("dispute", "DisputeListParams"),
    "events": ("event", "EventListParams"),
    "invoice_payments": ("invoice_payment", "InvoicePaymentListParams"),
    "invoices": ("invoice", "InvoiceListParams"),
    "payment_intents": ("payment_intent", "PaymentIntentListParams"),
    "prices": ("price", "PriceListParams"),
    "refunds": ("refund", "RefundListParams"),
    "subscriptions": ("subscription", "SubscriptionListParams"),
}
"""What can be retrieved and listed: paths, and objects with the parameters of their lists."""

_COLLECTION = "|".join(_KINDS)
_ENDED = ("canceled", "incomplete_expired")


@dataclass(frozen=True)
class Request:
    """A request that came in."""

    method: str
    path: str
    parameters: Json
    idempotency_key: str | None


@dataclass(frozen=True)
class Answer:
    """What it was answered with."""

    status: int
    body: Json
    is_replayed: bool = False


class Api(Merchant):
    """A merchant, reached by Stripe's API.

    :ivar requests: those that came in with the right key, in their order; repeated ones too.
    """

    def __init__(self, now: Callable[[], datetime], rng: random.Random, *, livemode: bool = False,
                 page: int = 100) -> None:  # fmt: skip
        super().__init__(now, rng, livemode=livemode, page=page)
        self.requests: list[Request] = []
        self._answers: dict[str, tuple[Request, Answer]] = {}
        self._routes: list[tuple[str, re.Pattern[str], Callable[..., Json]]] = [
            (method, re.compile(f"/v1/{path}"), handler)
            for method, path, handler in (
                ("GET", f"({_COLLECTION})", self._list),
                ("GET", f"({_COLLECTION})/([^/]+)", self._retrieve),
                ("GET", "checkout/sessions/([^/]+)/line_items", self._line_items),
                ("GET", "invoices/([^/]+)/lines", self._invoice_lines),
                ("GET", "subscription_items", self._subscription_items),
                ("POST", "customers", self._create_customer),
                ("POST", "prices", self._create_price),
                ("POST", "checkout/sessions", self._create_session),
                ("POST", "checkout/sessions/([^/]+)/expire", self._expire_session),
                ("POST", "billing_portal/sessions", self._create_portal),
                ("POST", "refunds", self._create_refund),
                ("POST", "subscriptions/([^/]+)", self._update_subscription),
                ("DELETE", "subscriptions/([^/]+)", self._cancel_subscription),
            )
        ]

    def call(self, method: str, path: str, parameters: Mapping[str, Any] | None = None,
             idempotency_key: str | None = None) -> Answer:  # fmt: skip
        """Answer a request.

        :param path: from ``/v1`` on.
        :param parameters: as the form gives them, nested.
        """
        request = Request(method, path, copy.deepcopy(dict(parameters or {})), idempotency_key)
        with self.lock:
            self.requests.append(request)
            if method != "POST" or idempotency_key is None:
                return self._answer(request)
            if len(idempotency_key) > 255:
                return _refusal(RefusedError(400, "Idempotency keys are at most 255 characters.",
                                             type="idempotency_error"))  # fmt: skip
            known = self._answers.get(idempotency_key)
            if known is None:
                answer = self._answer(request)
                if answer.status == 200:  # what was refused was never begun, and may be asked otherwise
                    self._answers[idempotency_key] = (request, answer)
                return answer
            if known[0] != request:
                message = "Keys for idempotent requests can only be used with the same parameters."
                return _refusal(RefusedError(400, message, type="idempotency_error"))
            return Answer(known[1].status, known[1].body, is_replayed=True)

    def _answer(self, request: Request) -> Answer:
        try:
            for method, pattern, handler in self._routes:
                found = pattern.fullmatch(request.path)
                if found and method == request.method:
                    # As it is sent: what is answered must not change with the objects.
                    return Answer(200, json.loads(json.dumps(handler(request.parameters, *found.groups()))))
            raise RefusedError(404, f"Unrecognized request URL ({request.method}: {request.path}).")
        except RefusedError as refused:
            return _refusal(refused)

    # Reading

    def _retrieve(self, given: Json, path: str, id: str) -> Json:
        _only(given, "expand")
        kind, _ = _KINDS[path]
        return self.shown(self.find(kind, id), given.get("expand", ()))

    def _list(self, given: Json, path: str) -> Json:
        kind, parameters = _KINDS[path]
        check_parameters(given, parameters)
        found = [each for each in self.all_of(kind) if _is_wanted(each, given) and self._is_listed(each, given)]
        return self._page(found, given, f"/v1/{path}")

    def _is_listed(self, object: Json, given: Json) -> bool:
        """Whether an object is in a list by the rules of its own kind."""
        wanted = given.get("status")
        if object["object"] == "subscription" and wanted != "all":
            ended = object["status"] in _ENDED
            return ended if wanted == "ended" else object["status"] == wanted if wanted else not ended
        if object["object"] != "event":
            return wanted in (None, "all", object.get("status"))
        if "type" in given and "types" in given:
            raise RefusedError(400, "You may only specify one of these parameters: type, types.")
        types = given.get("types") or ([given["type"]] if "type" in given else None)
        if types is not None and len(types) > 20:
            raise RefusedError(400, "At most 20 types.", param="types")
        if types is not None and object["type"] not in types:
            return False
        if "delivery_success" in given and flag(given, "delivery_success") != (object["pending_webhooks"] == 0):
            return False
        return bool(object["created"] > self.now() - EVENT_DAYS * 86400)

    def _line_items(self, given: Json, id: str) -> Json:
        check_parameters(given, "checkout.SessionLineItemListParams")
        self.find("checkout.session", id, "session")
        return self._page(self.within(id, "line_items"), given, f"/v1/checkout/sessions/{id}/line_items")

    def _invoice_lines(self, given: Json, id: str) -> Json:
        check_parameters(given, "InvoiceLineItemListParams")
        self.find("invoice", id, "invoice")
        return self._page(self.within(id, "lines"), given, f"/v1/invoices/{id}/lines")

    def _subscription_items(self, given: Json) -> Json:
        check_parameters(given, "SubscriptionItemListParams")
        id = self.find("subscription", given.get("subscription", ""), "subscription", status=400)["id"]
        return self._page(self.within(id, "items"), given, "/v1/subscription_items")

    def _page(self, found: Sequence[Json], given: Json, url: str) -> Json:
        limit = whole(given, "limit", least=1)
        if limit is not None and limit > 100:
            raise RefusedError(400, "Invalid limit: at most 100.", code="parameter_invalid_integer", param="limit")
        after, start = given.get("starting_after"), 0
        if after is not None:
            # The last one of a page need not be in the list any more: what comes after is told by its place of all.
            place = next((index for index, each in enumerate(found) if each["id"] == after), None)
            if place is None:
                raise RefusedError(400, f"No such object: {after!r}", code="resource_missing", param="starting_after")
            start = place + 1
        most = min(limit or 10, self.page)
        answer = objects.listed([self.shown(each) for each in found[start : start + most]], url,
                                has_more=len(found) > start + most)  # fmt: skip
        for path in given.get("expand", ()):
            self.expand(answer, path.split("."))
        return answer

    # Writing

    def _create_customer(self, given: Json) -> Json:
        check_parameters(given, "CustomerCreateParams")
        return self.shown(self.add_customer(given.get("email"), given.get("name"), metadata(given)))

    def _create_price(self, given: Json) -> Json:
        check_parameters(given, "PriceCreateParams")
        return self.shown(self._priced(given, ""))

    def _priced(self, given: Json, where: str) -> Json:
        amount, currency, recurring = whole(given, "unit_amount"), given.get("currency"), given.get("recurring") or {}
        product = given.get("product") or given.get("product_data", {}).get("name")
        if amount is None or currency is None or product is None:
            raise RefusedError(400, "A price needs unit_amount, currency and a product.", code="parameter_missing",
                               param=where or None)  # fmt: skip
        return self.add_price(None, amount, currency, recurring.get("interval"),
                              count=whole(recurring, "interval_count", least=1) or 1,
                              product=given.get("product"))  # fmt: skip

    def _create_session(self, given: Json) -> Json:
        check_parameters(given, "checkout.SessionCreateParams")
        mode = given.get("mode", "payment")
        if mode not in ("payment", "subscription"):
            raise RefusedError(400, f"The fake knows no mode {mode!r}", param="mode")
        lines = given.get("line_items") or []
        if not lines:
            raise RefusedError(400, "Missing required param: line_items.", code="parameter_missing", param="line_items")
        if "success_url" not in given and given.get("ui_mode", "hosted_page") == "hosted_page":
            raise RefusedError(400, "Missing required param: success_url.", code="parameter_missing",
                               param="success_url")  # fmt: skip
        for name, only in (("payment_intent_data", "payment"), ("invoice_creation", "payment"),
                           ("customer_creation", "payment"), ("subscription_data", "subscription")):  # fmt: skip
            if name in given and mode != only:
                raise RefusedError(400, f"You can not pass `{name}` in `{mode}` mode.", param=name)
        if "customer" in given:
            self.find("customer", given["customer"], "customer", status=400)
            if "customer_email" in given:
                raise RefusedError(400, "You may only specify one of these parameters: customer, customer_email.")
        if len(given.get("client_reference_id", "")) > 200:
            raise RefusedError(400, "Invalid string: at most 200 characters", param="client_reference_id")
        discounts = given.get("discounts") or []
        if discounts and "allow_promotion_codes" in given:
            raise RefusedError(400, "You may only specify one of these parameters: allow_promotion_codes, discounts.")
        expires_at = whole(given, "expires_at")
        least, most = SESSION_SECONDS
        if expires_at is not None and not least <= expires_at - self.now() <= most:
            raise RefusedError(400, "The `expires_at` timestamp must be between 30 minutes and 24 hours from now.",
                               param="expires_at")  # fmt: skip
        sold = []
        for index, line in enumerate(lines):
            quantity = whole(line, "quantity", least=1)
            if quantity is None:
                raise RefusedError(400, "Quantity is required.", param=f"line_items[{index}][quantity]")
            where = f"line_items[{index}][price_data]"
            price = line.get("price") or self._priced(line.get("price_data") or {}, where)["id"]
            sold.append((price, quantity))
        taken = ("customer", "customer_email", "client_reference_id", "success_url", "cancel_url", "locale",
                 "customer_creation", "currency", "ui_mode", "submit_type")  # fmt: skip
        return self.shown(
            self.open_session(
                sold,
                mode=mode,
                coupon=discounts[0].get("coupon") if discounts else None,
                invoice_creation=flag(given.get("invoice_creation", {}), "enabled"),
                expires_at=expires_at,
                subscription_data=self._subscription_data(given.get("subscription_data", {})),
                payment_metadata=metadata(given.get("payment_intent_data", {}), "payment_intent_data[metadata]"),
                metadata=metadata(given),
                **{key: given[key] for key in taken if key in given},
            ),
            given.get("expand", ()),
        )

    def _subscription_data(self, given: Json) -> Json:
        days = whole(given, "trial_period_days", least=1)
        trial_end = whole(given, "trial_end") if days is None else self.now() + days * 86400
        return {"metadata": metadata(given, "subscription_data[metadata]"), "trial_end": trial_end}

    def _expire_session(self, given: Json, id: str) -> Json:
        check_parameters(given, "checkout.SessionExpireParams")
        return self.shown(self.expire(id))

    def _create_portal(self, given: Json) -> Json:
        check_parameters(given, "billing_portal.SessionCreateParams")
        self.find("customer", given.get("customer", ""), "customer", status=400)
        return self.open_portal(given["customer"], given.get("return_url"))

    def _create_refund(self, given: Json) -> Json:
        check_parameters(given, "RefundCreateParams")
        of = given.get("payment_intent") or given.get("charge")
        if of is None:
            raise RefusedError(400, "One of the following params should be provided: payment_intent or charge.")
        made = self.refund(of, whole(given, "amount"), metadata=metadata(given), reason=given.get("reason"))
        return self.shown(made, given.get("expand", ()))

    def _update_subscription(self, given: Json, id: str) -> Json:
        check_parameters(given, "SubscriptionModifyParams")
        object = self.live(id)
        if "cancel_at_period_end" in given:
            wanted = flag(given, "cancel_at_period_end")
            if wanted != object["cancel_at_period_end"]:
                self.cancel(id, at_period_end=True) if wanted else self.undo_cancel(id)
        if "pause_collection" in given:
            self.pause_collection(id, (given["pause_collection"] or {}).get("behavior"))
        for item in given.get("items", ()):
            self.change_plan(id, item["price"], quantity=whole(item, "quantity"),
                             proration=given.get("proration_behavior", "create_prorations"))  # fmt: skip
        return self.shown(object, given.get("expand", ()))

    def _cancel_subscription(self, given: Json, id: str) -> Json:
        check_parameters(given, "SubscriptionCancelParams")
        return self.shown(self.cancel(id), given.get("expand", ()))


def _only(given: Json, *known: str) -> None:
    for name in given:
        if name not in known:
            raise RefusedError(400, f"Received unknown parameter: {name}", code="parameter_unknown", param=name)


def _refusal(refused: RefusedError) -> Answer:
    return Answer(refused.status, refused.body)


def _is_wanted(object: Json, given: Json) -> bool:
    """Whether an object fits the filters that kinds have in common."""
    created = given.get("created")
    if isinstance(created, dict):
        compare = {"gt": int.__gt__, "gte": int.__ge__, "lt": int.__lt__, "lte": int.__le__}
        if not all(compare[name](object["created"], whole(created, name) or 0) for name in created):
            return False
    elif created is not None and object["created"] != whole(given, "created"):
        return False
    payment = given.get("payment") or {}
    if payment and object["payment"].get(payment.get("type")) != payment.get(payment.get("type")):
        return False
    parent = object.get("parent") or {}
    subscription = (parent.get("subscription_details") or object).get("subscription")
    if given.get("subscription") not in (None, subscription):
        return False
    names = ("customer", "charge", "payment_intent", "invoice", "email")
    return all(given[name] == object.get(name) for name in names if name in given)
