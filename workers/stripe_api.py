"""Stripe's API, as far as it is asked: objects again as they are now, lists to reconcile by, checkouts to sell by.

Answers are plain JSON values, never objects of stripe-python, which hold the API key. Nor do the errors hold it: behind
what the library raises is the request with its key, so nothing of that is kept, not even as a cause.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeGuard
from urllib.parse import quote

import msgspec
from stripe import APIConnectionError, RequestsClient, StripeClient, StripeError

from models.settings import Settings
from workers.providers.base import ParkedError

Json = dict[str, Any]

CONNECT_SECONDS = 3.0
READ_SECONDS = 20.0
MAX_RETRIES = 2
"""How often a request that got no answer, or one of 500 and above, is sent again."""

PAGE = 100
"""How many objects a page of a list has: the most that Stripe gives."""

MAX_PAGES = 20
"""The most pages of a list within an object."""

MAX_LISTED_PAGES = 1000
"""The most pages of a list to reconcile by."""

SESSION_DAYS = 21
"""How long after a checkout began it may still be paid: a day until it is gone through, and a debit takes two weeks of
banking days."""

INVOICE_DAYS = 60
"""How long after an invoice was made it may still be paid: the longest that Stripe tries."""

REFUND_DAYS = 35
"""How long after a refund was made its state may change."""

DISPUTE_DAYS = 180
"""How long after a dispute was opened its state may change."""

_AWAY = frozenset({401, 403, 409, 429})
"""Answers below 500 that say nothing of what was asked: a key that is not let in, a lock, too many requests."""


class StripeApiError(Exception):
    """A request to Stripe's API that came to nothing. It can be pickled, and names no secret.

    :param code: what callers decide by.
    :param sentence: what is wrong, for the log; nothing of Stripe's own wording is in it.
    """

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(code, sentence)
        self.code = code
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class UnavailableError(StripeApiError):
    """Stripe is out of reach, or does not let us in at present: the same may be asked again later."""


class StripeRefusedError(StripeApiError):
    """Stripe does not do what was asked, and would not later; ``code`` is Stripe's own."""


class LimitError(StripeApiError):
    """A list to reconcile by is longer than :data:`MAX_LISTED_PAGES`: ask for a shorter time."""


class MissingError(ParkedError):
    """Stripe has no such object: an adapter parks the event that names it."""


class _Kind(NamedTuple):
    """Where an object of a kind is, and its lists: each with its path and what tells it from others there."""

    path: str
    lists: Mapping[str, tuple[str, str | None]] = {}
    expand: tuple[str, ...] = ()


_KINDS = {
    "checkout.session": _Kind(
        "/v1/checkout/sessions/{id}",
        {"line_items": ("/v1/checkout/sessions/{id}/line_items", None)},
        ("line_items",),
    ),
    "invoice": _Kind(
        "/v1/invoices/{id}",
        {"lines": ("/v1/invoices/{id}/lines", None), "payments": ("/v1/invoice_payments", "invoice")},
        ("payments",),
    ),
    "subscription": _Kind("/v1/subscriptions/{id}", {"items": ("/v1/subscription_items", "subscription")}),
    "refund": _Kind("/v1/refunds/{id}"),
    "dispute": _Kind("/v1/disputes/{id}"),
    "payment_intent": _Kind("/v1/payment_intents/{id}"),
    "charge": _Kind("/v1/charges/{id}"),
}

_read = msgspec.json.Decoder(Json).decode
_PAID = ("paid", "no_payment_required")


class StripeApi:
    """A client of Stripe's API. Safe to share among threads, of no use to another process.

    :param api_key: a secret or a restricted one.
    :param livemode: whether the ledger is for live money: answers of the other mode are refused.
    :param base_address: another address than Stripe's own, to try things out.
    :param timeout_seconds: to connect, and to wait for an answer.
    """

    def __init__(self, api_key: str, livemode: bool, base_address: str | None = None, *,
                 timeout_seconds: tuple[float, float] = (CONNECT_SECONDS, READ_SECONDS)) -> None:  # fmt: skip
        logging.getLogger("stripe").setLevel(logging.WARNING)  # below that it logs whole bodies
        self._livemode = livemode
        self._client = StripeClient(
            api_key,
            base_addresses={"api": base_address} if base_address else {},
            http_client=RequestsClient(timeout=timeout_seconds),
            max_network_retries=MAX_RETRIES,
        )

    def fetch(self, kind: str, id: str) -> Json:
        """Get an object as it is now, with its lists complete; for adapters (:data:`workers.providers.base.Fetch`).

        :param kind: such as ``checkout.session``.
        :raises MissingError: when Stripe has none.
        :raises ParkedError: when a list of it has more than :data:`MAX_PAGES` pages.
        :raises UnavailableError: when Stripe is out of reach.
        :raises StripeRefusedError: when it refuses to say.
        """
        known = _KINDS[kind]
        named = quote(id, safe="")
        try:
            fetched = self._request("get", known.path.format(id=named), {"expand": list(known.expand)})
        except StripeRefusedError as refused:
            if refused.code != "resource_missing":
                raise
        else:
            for name, (path, parameter) in known.lists.items():
                self._complete(fetched, name, path.format(id=named), {parameter: id} if parameter else {})
            return fetched
        raise MissingError("missing", f"Stripe has no {kind} {id}")

    def _complete(self, object: Json, name: str, path: str, parameters: Json) -> None:
        """Get the rest of a list that an object has the beginning of."""
        held: Json = object[name]
        if not held["has_more"]:
            return
        after = held["data"][-1]["id"] if held["data"] else None
        try:
            held["data"] += self._listed(path, parameters, MAX_PAGES, after)
        except LimitError:
            raise ParkedError("truncated", f"{object['id']} has more than {MAX_PAGES * PAGE} {name}") from None
        held["has_more"] = False

    # Lists to reconcile by, the newest first. Stripe lists by when an object was made, so these reach back as far
    # before ``since`` as it may have been made. What is made while a list is read may be missing from it.

    def undelivered_events(self, since: datetime) -> Iterator[Json]:
        """Events since then that a webhook has not taken; Stripe keeps 30 days of them."""
        return self._since("/v1/events", since, 0, delivery_success="false")

    def paid_sessions(self, since: datetime) -> Iterator[Json]:
        """Checkouts that are paid, or had nothing to be paid, of those that may have come to it since then."""
        sessions = self._since("/v1/checkout/sessions", since, SESSION_DAYS, status="complete")
        return (session for session in sessions if session["payment_status"] in _PAID)

    def paid_invoices(self, since: datetime) -> Iterator[Json]:
        """Invoices that were paid since then."""
        least = int(since.timestamp())
        invoices = self._since("/v1/invoices", since, INVOICE_DAYS, status="paid")
        return (invoice for invoice in invoices if (invoice["status_transitions"]["paid_at"] or least) >= least)

    def refunds(self, since: datetime) -> Iterator[Json]:
        """Refunds, in whatever state, of those that may have changed since then."""
        return self._since("/v1/refunds", since, REFUND_DAYS)

    def disputes(self, since: datetime) -> Iterator[Json]:
        """Disputes, in whatever state, of those that may have changed since then."""
        return self._since("/v1/disputes", since, DISPUTE_DAYS)

    def subscriptions(self, since: datetime) -> Iterator[Json]:
        """Subscriptions that began since then, in whatever state."""
        return self._since("/v1/subscriptions", since, 0, status="all")

    def live_subscriptions(self) -> Iterator[Json]:
        """Every subscription that has not ended, however old; another one that is held to be live has ended."""
        return self._listed("/v1/subscriptions", {}, MAX_LISTED_PAGES)

    def invoices_of(self, subscription: str) -> Iterator[Json]:
        """The invoices of a subscription, in whatever state."""
        return self._listed("/v1/invoices", {"subscription": subscription}, MAX_LISTED_PAGES)

    def _since(self, path: str, since: datetime, days: int, **parameters: str) -> Iterator[Json]:
        least = int((since - timedelta(days=days)).timestamp())
        return self._listed(path, {"created": {"gte": least}, **parameters}, MAX_LISTED_PAGES)

    def _listed(self, path: str, parameters: Mapping[str, Any], pages: int, after: str | None = None) -> Iterator[Json]:
        """The objects of a list, page by page.

        :param after: the id of the object that they come after.
        :raises LimitError: after so many pages, when there are more.
        """
        for _ in range(pages):
            start = {} if after is None else {"starting_after": after}
            page = self._request("get", path, {"limit": PAGE, **parameters, **start})
            yield from page["data"]
            if not page["has_more"] or not page["data"]:
                return
            after = page["data"][-1]["id"]
        raise LimitError("limit", f"{path} has more than {pages * PAGE} objects")

    # Selling

    def create_checkout(self, parameters: Mapping[str, Any], idempotency_key: str) -> Json:
        """Open a checkout session.

        :param idempotency_key: of at most 255 characters; the same one again gives the same session.
        :raises UnavailableError: when Stripe is out of reach: whether it was opened is not known.
        :raises StripeRefusedError: when Stripe refuses.
        """
        return self._request("post", "/v1/checkout/sessions", parameters, idempotency_key)

    def create_portal(self, customer: str, return_url: str, idempotency_key: str) -> Json:
        """Open the page on which a customer sees and cancels subscriptions; as :meth:`create_checkout`."""
        parameters = {"customer": customer, "return_url": return_url}
        return self._request("post", "/v1/billing_portal/sessions", parameters, idempotency_key)

    def create_customer(self, parameters: Mapping[str, Any], idempotency_key: str) -> Json:
        """Make a customer; as :meth:`create_checkout`."""
        return self._request("post", "/v1/customers", parameters, idempotency_key)

    def _request(self, method: str, path: str, parameters: Mapping[str, Any], key: str | None = None) -> Json:
        asked = f"{method.upper()} {path}"
        once = {} if key is None else {"idempotency_key": key}
        problem: StripeApiError
        try:
            answer = _read(self._client.raw_request(method, path, **parameters, **once).body)
        except StripeError as error:
            problem = _problem(error, asked)
        except msgspec.MsgspecError:
            problem = UnavailableError("unreadable", f"{asked}: what Stripe answered cannot be read")
        else:
            if answer.get("livemode") in (None, self._livemode):
                return answer
            problem = StripeRefusedError("other_mode", f"{asked}: an answer of another mode than ours")
        raise problem  # out here, where nothing is being handled that would be kept as its context


def make_stripe_api(config: Settings) -> StripeApi | None:
    """The client that the settings say; None without an API key."""
    key = config.stripe_api_key
    if key is None:
        return None
    return StripeApi(key.get_secret_value(), config.payments_livemode, config.stripe_api_base or None)


def _problem(error: StripeError, asked: str) -> StripeApiError:
    """What of an error of the library may be told."""
    if isinstance(error, APIConnectionError):
        cause = type(error.__cause__ or error).__name__
        return UnavailableError("unreachable", f"{asked}: Stripe is out of reach ({cause})")
    status = error.http_status or 0
    said = error.json_body.get("error") if isinstance(error.json_body, dict) else None
    said = said if isinstance(said, dict) else {}
    code = next(filter(_is_code, (said.get("code"), said.get("type"))), None) or f"http_{status}"
    if said == {} or status in _AWAY or status >= 500 or code == "rate_limit":
        return UnavailableError(code, f"{asked}: Stripe answered HTTP {status}, {code}")
    return StripeRefusedError(code, f"{asked}: Stripe refused with {code}")


def _is_code(text: object) -> TypeGuard[str]:
    """Whether it is a word of Stripe's, which can be shown."""
    return isinstance(text, str) and len(text) <= 64 and text.isascii() and text.isidentifier()
