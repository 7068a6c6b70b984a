"""What is asked of the provider for a checkout: who buys, what, for how much, until when (payments: selling).

The catalog decides, or an administrator's quote: a message only names what it wants. Nothing here gives credits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Annotated, Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import msgspec
from psycopg import Connection

from creditlane.contract import Name
from creditlane.selling import Page, SaleCode
from models.orders import NotSoldError, opened, order
from models.reading import load_account
from models.rules.catalog import MINOR_DIGITS, Catalog, Money, PriceId
from models.rules.settling import settle
from models.rules.state import CLOSED, UNOPENED, Account
from models.settings import is_loopback
from workers.providers.base import ACCOUNT_KEY, ORDER_KEY
from workers.providers.stripe import STRIPE_DIGITS

PROVIDER = "stripe"

MAX_QUANTITY = 100
"""Packs of one checkout."""

MAX_URL = 2000
"""Characters in a URL."""

SESSION = timedelta(hours=24)
SHORTEST_SESSION = timedelta(minutes=30)
"""How long a checkout stays open by itself, and at the least."""

LOCALES = {
    locale.lower(): locale
    for locale in (
        "bg", "cs", "da", "de", "el", "en", "en-GB", "es", "es-419", "et", "fi", "fil", "fr", "fr-CA", "hi-IN", "hr",
        "hu", "id", "it", "ja", "ko", "lt", "lv", "ms", "mt", "nb", "nl", "pl", "pt", "pt-BR", "ro", "ru", "sk", "sl",
        "sv", "th", "tr", "vi", "zh", "zh-HK", "zh-TW",
    )
}  # fmt: skip
"""The languages of the provider's pages."""

_ADDRESS = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s.]+\Z")
"""What the provider may take for an e-mail address; a customer needs none."""

CUSTOMER = """
SELECT id FROM payment_bindings
WHERE account = %s AND provider = %s AND livemode = %s AND kind = 'customer' ORDER BY bound_at, id LIMIT 1
"""
BIND = """
INSERT INTO payment_bindings (provider, livemode, kind, id, account, bound_at)
VALUES (%s, %s, 'customer', %s, %s, ledger_now()) ON CONFLICT DO NOTHING
"""
SUBSCRIPTIONS = """
SELECT count(*), count(*) FILTER (WHERE f.fact->>'status' NOT IN ('incomplete', 'incomplete_expired', 'canceled'))
FROM payment_bindings b
LEFT JOIN payment_facts f ON f.provider = b.provider AND f.livemode = b.livemode AND f.kind = 'SubscriptionChanged'
                         AND f.key = b.id
WHERE b.account = %s AND b.provider = %s AND b.livemode = %s AND b.kind = 'subscription'
"""
"""How many the account ever had, and how many it has: a payment may be quicker than what it gives."""
BOUGHT = """
SELECT coalesce(sum((line->>'quantity')::bigint), 0)
FROM payment_facts f CROSS JOIN json_array_elements(f.fact->'lines') line
WHERE f.kind = 'PackPaid' AND f.provider = %(provider)s AND f.livemode = %(livemode)s
  AND f.group_id IN (SELECT group_id FROM payment_operations WHERE account = %(account)s)
  AND line->>'price' = ANY(%(prices)s)
"""


class Selling(Protocol):
    """What is asked of the provider's API; objects are plain JSON."""

    def create_checkout(self, parameters: dict[str, Any], idempotency_key: str) -> Mapping[str, Any]:
        """Make a checkout session."""

    def create_portal(self, customer: str, return_url: str, idempotency_key: str) -> Mapping[str, Any]:
        """Make a session of the billing portal."""

    def create_customer(self, parameters: dict[str, Any], idempotency_key: str) -> Mapping[str, Any]:
        """Make a customer."""


def check_page(url: str, name: str) -> None:
    """Check that a buyer may be sent to a URL.

    :param name: what to call it.
    :raises ValueError: unless it is ``https://``, or ``http://`` on loopback, and nothing else.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        good = url.isascii() and url.isprintable() and not set(' \\"<>') & set(url) and bool(host) and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.scheme not in ("http", "https") or "@" in parts.netloc:
        raise ValueError(f"{name} is not a URL of the kind https://host/path")
    if parts.scheme == "http" and not is_loopback(host):
        raise ValueError(f"{name} begins with https://, unless it is on loopback")


Url = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_URL)]


class Order(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What ``payments.checkout`` is sent."""

    account: Name
    success_url: Url
    cancel_url: Url
    request: Name
    pack: Name | None = None
    plan: Name | None = None
    offer: Name | None = None
    quote: Name | None = None
    quantity: Annotated[int, msgspec.Meta(ge=1, le=MAX_QUANTITY)] = 1

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.pack, self.plan, self.offer, self.quote)) != 1:
            raise ValueError("send pack, plan, offer or quote, one of the four")
        if self.quantity != 1 and self.pack is None and self.offer is None:
            raise ValueError("quantity goes with pack or offer")
        check_page(self.success_url, "success_url")
        check_page(self.cancel_url, "cancel_url")


class Thing(NamedTuple):
    """Something that is for sale, as a checkout has it."""

    line: dict[str, Any]
    """The line item, but for its quantity."""
    ends_at: datetime | None = None
    """When it is no longer for sale."""
    salt: str | None = None
    """For what may be bought so often and no more: how often it was. All requests for the next one are then one."""
    subscription: dict[str, Any] | None = None
    """What the provider is told of the subscription, where it is a plan."""
    metadata: Mapping[str, str] = {}


def open_checkout(
    connection: Connection[Any], api: Selling, catalog: Catalog, wanted: Order, *, livemode: bool
) -> Page:
    """Make a checkout, or give the one that the same request made before.

    :param connection: in autocommit mode.
    :param livemode: whether it is about live money.
    :raises NotSoldError: with why not.
    """
    loaded = load_account(connection, wanted.account)
    if loaded is None or loaded[0].status == UNOPENED:
        raise NotSoldError(SaleCode.UNKNOWN_ACCOUNT)
    account, now = loaded
    if account.status == CLOSED:
        raise NotSoldError(SaleCode.ACCOUNT_CLOSED)
    thing = _find(connection, catalog, wanted, account, now, livemode)
    parameters = _parameters(wanted, account, thing, now)
    parameters["customer"] = _customer(connection, api, account, livemode)
    made = api.create_checkout(parameters, _key("checkout", livemode, parameters, thing.salt or wanted.request))
    if thing.salt is not None and made["expires_at"] <= now.timestamp():
        # The answer of before, to one that nobody paid in its time.
        made = api.create_checkout(parameters, _key("checkout", livemode, parameters, thing.salt, wanted.request))
    if wanted.quote is not None:
        opened(connection, wanted.quote, made["id"])
    return Page(
        status="done", url=made["url"], id=made["id"], expires_at=datetime.fromtimestamp(made["expires_at"], UTC)
    )


def customer_of(connection: Connection[Any], account: str, *, livemode: bool) -> str | None:
    """The provider's customer that an account is, if it is one."""
    row = connection.execute(CUSTOMER, (account, PROVIDER, livemode)).fetchone()
    return None if row is None else str(row[0])


def _find(
    connection: Connection[Any], catalog: Catalog, wanted: Order, account: Account, now: datetime, livemode: bool
) -> Thing:
    if wanted.pack is not None:
        return _pack(catalog, wanted.pack)
    if wanted.offer is not None:
        return _offer(connection, catalog, wanted.offer, wanted, now, livemode)
    if wanted.plan is not None:
        return _plan(connection, catalog, wanted.plan, account, now, livemode)
    assert wanted.quote is not None
    return _quote(connection, catalog, wanted.quote, account)


def _pack(catalog: Catalog, name: str) -> Thing:
    pack = catalog.packs.get(name)
    if pack is None:
        raise NotSoldError(SaleCode.UNKNOWN_PACK)
    return Thing({"price": _first(pack.prices)})


def _offer(
    connection: Connection[Any], catalog: Catalog, name: str, wanted: Order, now: datetime, livemode: bool
) -> Thing:
    offer = catalog.offers.get(name)
    if offer is None:
        raise NotSoldError(SaleCode.UNKNOWN_OFFER)
    line = {"price": _first(offer.prices)}
    if not offer.runs_at(now):
        raise NotSoldError(SaleCode.OFFER_OVER)
    if offer.per_account is None:
        return Thing(line, offer.ends_at)
    values = {"provider": PROVIDER, "livemode": livemode, "account": wanted.account, "prices": offer.prices}
    row = connection.execute(BOUGHT, values).fetchone()
    bought = 0 if row is None else int(row[0])
    if bought + wanted.quantity > offer.per_account:
        raise NotSoldError(SaleCode.OFFER_USED)
    return Thing(line, offer.ends_at, f"{name}, after {bought}")


def _plan(
    connection: Connection[Any], catalog: Catalog, name: str, account: Account, now: datetime, livemode: bool
) -> Thing:
    plan = catalog.plans.get(name)
    if plan is None:
        raise NotSoldError(SaleCode.UNKNOWN_PLAN)
    line = {"price": _first(plan.prices)}
    settle(account, now, catalog)
    subscription = account.subscription
    row = connection.execute(SUBSCRIPTIONS, (account.account, PROVIDER, livemode)).fetchone()
    ever, present = (0, 0) if row is None else row
    pays = subscription is not None and subscription.terms.paid
    if present or (pays and subscription is not None and subscription.is_active):
        raise NotSoldError(SaleCode.ALREADY_SUBSCRIBED)
    is_first = not ever and not pays
    trial = {"trial_period_days": plan.trial_days} if plan.trial_days is not None and is_first else {}
    return Thing(line, subscription=trial)


def _quote(connection: Connection[Any], catalog: Catalog, id: str, account: Account) -> Thing:
    quoted = order(connection, id)
    if quoted is None or quoted.account != account.account:
        raise NotSoldError(SaleCode.UNKNOWN_QUOTE)
    if quoted.status == "inquiry":
        raise NotSoldError(SaleCode.QUOTE_NOT_READY)
    if quoted.status != "quoted" or quoted.is_over:
        raise NotSoldError(SaleCode.QUOTE_OVER)
    pack = catalog.packs.get(quoted.pack)
    if pack is None or pack.quote_above is None:
        raise NotSoldError(SaleCode.UNKNOWN_PACK)
    assert quoted.price is not None
    price = Money.parse(quoted.price)
    line = {
        "price_data": {
            "currency": price.currency.lower(),
            "unit_amount": stripe_amount(price),
            "product_data": {"name": f"{pack.title or quoted.pack}: {quoted.credits}"},
        }
    }
    return Thing(line, quoted.expires_at, quoted.id, metadata={ORDER_KEY: quoted.id})


def _first(prices: list[PriceId]) -> str:
    if not prices:
        raise NotSoldError(SaleCode.NO_PRICE)
    return prices[0]


def _parameters(wanted: Order, account: Account, thing: Thing, now: datetime) -> dict[str, Any]:
    """What the provider is asked for. Account and order stand wherever an event of it may look for them."""
    metadata = {ACCOUNT_KEY: wanted.account, **thing.metadata}
    parameters: dict[str, Any] = {
        "mode": "payment" if thing.subscription is None else "subscription",
        "line_items": [{**thing.line, "quantity": wanted.quantity}],
        "client_reference_id": wanted.account,
        "metadata": metadata,
        "success_url": wanted.success_url,
        "cancel_url": wanted.cancel_url,
        "locale": stripe_locale(account.locale),
    }
    if thing.subscription is None:
        parameters["payment_intent_data"] = {"metadata": metadata}
    else:
        parameters["subscription_data"] = {"metadata": metadata, **thing.subscription}
    if thing.ends_at is not None and thing.ends_at < now + SESSION:
        parameters["expires_at"] = int(max(thing.ends_at, _next_half_hour(now + SHORTEST_SESSION)).timestamp())
    return parameters


def _next_half_hour(instant: datetime) -> datetime:
    """So that what is asked for again within minutes is the same."""
    seconds = int(SHORTEST_SESSION.total_seconds())
    return datetime.fromtimestamp((int(instant.timestamp()) // seconds + 1) * seconds, UTC)


def _customer(connection: Connection[Any], api: Selling, account: Account, livemode: bool) -> str:
    """The account's customer, made if there is none. Of two that are made at a time, the provider makes one."""
    known = customer_of(connection, account.account, livemode=livemode)
    if known is not None:
        return known
    parameters: dict[str, Any] = {"metadata": {ACCOUNT_KEY: account.account}}
    if account.email is not None and _ADDRESS.match(account.email):
        parameters["email"] = account.email
    made = str(api.create_customer(parameters, _key("customer", livemode, parameters))["id"])
    connection.execute(BIND, (PROVIDER, livemode, made, account.account))
    return made


def _key(kind: str, *parts: Any) -> str:
    """An idempotency key of all that decides."""
    return f"{kind}-{sha256(msgspec.json.encode(parts, order='sorted')).hexdigest()}"


def stripe_amount(money: Money) -> int:
    """Money in Stripe's smallest units.

    :raises NotSoldError: when it is no whole number of those.
    """
    digits = MINOR_DIGITS.get(money.currency, 2)
    shift = STRIPE_DIGITS.get(money.currency, digits) - digits
    if shift >= 0:
        return money.minor * int(10**shift)
    whole, rest = divmod(money.minor, int(10**-shift))
    if rest:
        raise NotSoldError(SaleCode.INVALID, f"Stripe takes no fractions of {money.currency}")
    return whole


def stripe_locale(locale: str | None) -> str:
    """The language of the provider's pages; ``auto`` is the browser's."""
    tag = (locale or "").replace("_", "-").lower()
    return LOCALES.get(tag) or LOCALES.get(tag.partition("-")[0]) or "auto"
