"""Orders: credits in a quantity of their own, quoted by an administrator, or packs at their price (payments: selling).

An order is an ``inquiry``, then ``quoted``, then ``paid`` (``models/payments.py`` notes that); until then it can be
``cancelled``. What was quoted is never changed: who wants other terms gets another quote.
"""

from __future__ import annotations

from base64 import b32encode
from collections.abc import Sequence
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, Literal
from uuid import uuid4

import msgspec
from psycopg import Connection

from creditlane.amounts import MAX_MICRO, format_amount, parse_amount
from creditlane.contract import LAST_INSTANT, Text
from creditlane.selling import SaleCode
from models.reading import DEFAULT_PAGE, MAX_PAGE
from models.rules.catalog import Catalog, Money
from models.rules.state import CLOSED, UNOPENED

MAX_OPEN = 10
"""Inquiries of one account that may wait for a quote."""

MAX_PLACED = 50
"""Orders of one account, at the catalog's price, that may wait for their payment."""

LASTS = timedelta(days=14)
"""How long such an order is shown as open; a payment that comes later counts all the same."""

CATALOG = "catalog"
"""Who quotes what the catalog has a price for."""

MAX_MINOR = 10**12
"""The largest price of a quote, in minor units."""

NOT_AHEAD = "a quote that is over before it begins: expires_at is not in the future"

_COLUMNS = (
    "id, account, status, pack, asked_micro, credits_micro, price_minor, currency, expires_at, actor, note, created_at,"
    " quoted_at, session_id, paid_by, status = 'quoted' AND expires_at <= ledger_now() AS is_over"
)
ASK = """
INSERT INTO payment_orders (id, account, status, pack, asked_micro, note, created_at)
SELECT %(id)s, %(account)s, 'inquiry', %(pack)s, %(credits)s, %(note)s, ledger_now()
WHERE (SELECT count(*) FROM payment_orders WHERE account = %(account)s AND status = 'inquiry') < %(most)s
ON CONFLICT (id) DO NOTHING
"""
QUOTE = f"""
UPDATE payment_orders
SET status = 'quoted', credits_micro = %(credits)s, price_minor = %(price)s, currency = %(currency)s,
    expires_at = %(expires_at)s, actor = %(actor)s, quoted_at = ledger_now()
WHERE id = %(id)s AND status = 'inquiry' AND %(expires_at)s > ledger_now()
RETURNING {_COLUMNS}
"""
NEW_QUOTE = f"""
INSERT INTO payment_orders (id, account, status, pack, credits_micro, price_minor, currency, expires_at, actor, note,
                            created_at, quoted_at)
SELECT %(id)s, %(account)s, 'quoted', %(pack)s, %(credits)s, %(price)s, %(currency)s, %(expires_at)s, %(actor)s,
       %(note)s, now, now
FROM ledger_now() AS now WHERE %(expires_at)s > now
RETURNING {_COLUMNS}
"""
WITHDRAW = f"""
UPDATE payment_orders SET status = 'cancelled', actor = %s WHERE id = %s AND status IN ('inquiry', 'quoted')
RETURNING {_COLUMNS}
"""
OPENED = "UPDATE payment_orders SET session_id = %s WHERE id = %s"
PLACE = """
INSERT INTO payment_orders (id, account, status, pack, credits_micro, price_minor, currency, expires_at, actor,
                            created_at, quoted_at)
SELECT %(id)s, %(account)s, 'quoted', %(pack)s, %(credits)s, %(price)s, %(currency)s, now + %(lasts)s, %(actor)s, now,
       now
FROM ledger_now() AS now
WHERE (SELECT count(*) FROM payment_orders WHERE account = %(account)s AND status = 'quoted' AND actor = %(actor)s
       AND expires_at > now) < %(most)s
ON CONFLICT (id) DO NOTHING
"""
ONE = f"SELECT {_COLUMNS} FROM payment_orders WHERE id = %s"
OPEN = f"""
SELECT {_COLUMNS} FROM payment_orders
WHERE status IN ('inquiry', 'quoted') AND actor IS DISTINCT FROM '{CATALOG}' ORDER BY created_at, id LIMIT %s
"""
OF_ACCOUNT = f"SELECT {_COLUMNS} FROM payment_orders WHERE account = %s ORDER BY created_at DESC, id LIMIT %s"
ACCOUNT = "SELECT status FROM accounts WHERE account = %s"

Status = Literal["inquiry", "quoted", "paid", "cancelled"]


class NotSoldError(Exception):
    """Why something is not sold.

    :param reason: the particular, where the code's sentence does not say it.
    """

    def __init__(self, code: SaleCode, reason: str | None = None) -> None:
        super().__init__(reason or code.sentence)
        self.code = code
        self.reason = reason or code.sentence


class OrderLine(msgspec.Struct, kw_only=True, frozen=True):
    """An order; amounts in credits as decimal strings."""

    id: str
    account: str
    status: Status
    pack: str
    """The pack of the catalog that is sold by quote."""
    asked: str | None
    """What the inquiry was for."""
    credits: str | None
    """What was quoted."""
    price: str | None
    """What it costs, as ``"99.00 EUR"``."""
    expires_at: datetime | None
    """Until when it can be bought."""
    is_over: bool
    """Whether that time has passed without a payment."""
    actor: str | None
    """Who quoted it, or withdrew it."""
    note: str | None
    created_at: datetime
    quoted_at: datetime | None
    session: str | None
    """The provider's last checkout of it."""
    paid_by: str | None
    """The purchase that paid it."""


def inquiry_id(account: str, request: str) -> str:
    """The id of the order that an account's request makes, however often it is sent."""
    return f"order.{sha256(msgspec.json.encode([account, request])).hexdigest()[:32]}"


def inquire(
    connection: Connection[Any],
    account: str,
    credits_micro: int,
    catalog: Catalog,
    *,
    request: str,
    pack: str | None = None,
    note: str | None = None,
) -> OrderLine:
    """Ask for a quote; asking again with the same request changes nothing.

    :param connection: in autocommit mode.
    :param credits_micro: how many, in micro-credits.
    :param request: chosen by the caller, who keeps it.
    :param pack: of those that are sold by quote; may be left out where there is one.
    :param note: the buyer's word to who quotes.
    :raises NotSoldError: with why not.
    """
    _check_account(connection, account)
    name, above = _quoted_pack(catalog, pack)
    if credits_micro <= above:
        reason = f"so few credits are sold in packs: a quote is for more than {format_amount(above)}"
        raise NotSoldError(SaleCode.INVALID, reason)
    id = inquiry_id(account, request)
    values = {
        "id": id, "account": account, "pack": name, "credits": credits_micro, "note": note, "most": MAX_OPEN,
    }  # fmt: skip
    connection.execute(ASK, values)
    made = order(connection, id)
    if made is None:
        raise NotSoldError(SaleCode.LIMIT_REACHED)
    if (made.pack, made.asked, made.note) != (name, format_amount(credits_micro), note):
        raise NotSoldError(SaleCode.ID_CONFLICT)
    return made


def quote(
    connection: Connection[Any],
    id: str,
    price: Money,
    catalog: Catalog,
    *,
    expires_at: datetime,
    actor: str,
    credits_micro: int | None = None,
) -> OrderLine:
    """Answer an inquiry: so many credits for so much, until then.

    :param credits_micro: what was asked for unless given.
    :param actor: the administrator who does.
    :raises NotSoldError: with why not.
    """
    found = order(connection, id)
    if found is None:
        raise NotSoldError(SaleCode.UNKNOWN_QUOTE)
    if credits_micro is None and found.asked is not None:
        credits_micro = parse_amount(found.asked)
    values = _terms(price, catalog, credits_micro, expires_at, actor)
    row = connection.execute(QUOTE, {"id": id, **values}).fetchone()
    if row is not None:
        return _line(row)
    if found.status == "inquiry":
        raise NotSoldError(SaleCode.INVALID, NOT_AHEAD)
    raise NotSoldError(SaleCode.ALREADY_QUOTED if found.status == "quoted" else SaleCode.QUOTE_OVER)


def new_quote(
    connection: Connection[Any],
    account: str,
    credits_micro: int,
    price: Money,
    catalog: Catalog,
    *,
    expires_at: datetime,
    actor: str,
    pack: str | None = None,
    note: str | None = None,
) -> OrderLine:
    """Quote what nobody asked for in writing, or anew with other terms.

    :raises NotSoldError: with why not.
    """
    _check_account(connection, account)
    name, _ = _quoted_pack(catalog, pack)
    values = _terms(price, catalog, credits_micro, expires_at, actor)
    identity = {"id": f"order.{uuid4().hex}", "account": account, "pack": name, "note": note}
    row = connection.execute(NEW_QUOTE, {**identity, **values}).fetchone()
    if row is None:
        raise NotSoldError(SaleCode.INVALID, NOT_AHEAD)
    return _line(row)


def placed_id(account: str, request: str) -> str:
    """The id of an order at the catalog's price: short letters and digits, so that it fits the text of a transfer."""
    digest = sha256(msgspec.json.encode([CATALOG, account, request])).digest()
    return f"CL{b32encode(digest[:10]).decode()}"


def place(connection: Connection[Any], account: str, pack: str, catalog: Catalog, *, request: str) -> OrderLine:
    """Order a pack at the catalog's price, for a provider that takes no price ids: its payment names the order.

    :param connection: in autocommit mode.
    :param request: chosen by the caller, who keeps it: with the same one there is one order.
    :raises NotSoldError: with why not.
    """
    _check_account(connection, account)
    found = catalog.packs.get(pack)
    if found is None:
        raise NotSoldError(SaleCode.UNKNOWN_PACK)
    if found.price is None:
        raise NotSoldError(SaleCode.NO_PRICE)
    price = Money.parse(found.price)
    credits = sum(lot.credits_micro for lot in found.lots)
    id = placed_id(account, request)
    values = {
        "id": id, "account": account, "pack": pack, "credits": credits, "price": price.minor,
        "currency": price.currency, "lasts": LASTS, "actor": CATALOG, "most": MAX_PLACED,
    }  # fmt: skip
    connection.execute(PLACE, values)
    made = order(connection, id)
    if made is None:
        raise NotSoldError(SaleCode.LIMIT_REACHED)
    if (made.account, made.pack) != (account, pack):
        raise NotSoldError(SaleCode.ID_CONFLICT)
    return made


def withdraw(connection: Connection[Any], id: str, *, actor: str) -> OrderLine:
    """Cancel an inquiry or a quote that was not paid. A payment that comes all the same is parked.

    :raises NotSoldError: for one that is not there, or was paid or cancelled before.
    """
    row = connection.execute(WITHDRAW, (_named(actor), id)).fetchone()
    if row is None:
        raise NotSoldError(SaleCode.UNKNOWN_QUOTE if order(connection, id) is None else SaleCode.QUOTE_OVER)
    return _line(row)


def opened(connection: Connection[Any], id: str, session: str) -> None:
    """Note the provider's checkout of an order."""
    connection.execute(OPENED, (session, id))


def order(connection: Connection[Any], id: str) -> OrderLine | None:
    """One order."""
    row = connection.execute(ONE, (id,)).fetchone()
    return None if row is None else _line(row)


def open_orders(connection: Connection[Any], *, limit: int = DEFAULT_PAGE) -> list[OrderLine]:
    """Inquiries and quotes that were not paid, the oldest first.

    :param limit: at most :data:`models.reading.MAX_PAGE`.
    """
    return [_line(row) for row in connection.execute(OPEN, (min(limit, MAX_PAGE),))]


def orders_of(connection: Connection[Any], account: str, *, limit: int = DEFAULT_PAGE) -> list[OrderLine]:
    """An account's orders, the newest first.

    :param limit: at most :data:`models.reading.MAX_PAGE`.
    """
    return [_line(row) for row in connection.execute(OF_ACCOUNT, (account, min(limit, MAX_PAGE)))]


def _check_account(connection: Connection[Any], account: str) -> None:
    row = connection.execute(ACCOUNT, (account,)).fetchone()
    if row is None or row[0] == UNOPENED:
        raise NotSoldError(SaleCode.UNKNOWN_ACCOUNT)
    if row[0] == CLOSED:
        raise NotSoldError(SaleCode.ACCOUNT_CLOSED)


def _quoted_pack(catalog: Catalog, name: str | None) -> tuple[str, int]:
    """A pack that is sold by quote, and above how many micro-credits."""
    quoted = {each: pack.quote_above for each, pack in catalog.packs.items() if pack.quote_above is not None}
    if name is None and len(quoted) == 1:
        name = next(iter(quoted))
    if name is None:
        known = ", ".join(sorted(quoted)) or "none"
        raise NotSoldError(SaleCode.UNKNOWN_PACK, f"name a pack that is sold by quote; the catalog has: {known}")
    if name not in quoted:
        raise NotSoldError(SaleCode.UNKNOWN_PACK, f"the catalog has no pack {name!r} that is sold by quote")
    return name, int(quoted[name])


def _terms(
    price: Money, catalog: Catalog, credits_micro: int | None, expires_at: datetime, actor: str
) -> dict[str, Any]:
    """What a quote says, checked."""
    if credits_micro is None or not 0 < credits_micro <= MAX_MICRO:
        raise NotSoldError(SaleCode.INVALID, "a quote is for more than 0 credits, and no more than an amount may be")
    if not 0 < price.minor <= MAX_MINOR:
        raise NotSoldError(SaleCode.INVALID, "a quote costs more than 0")
    if price.currency != catalog.catalog.currency:
        raise NotSoldError(SaleCode.INVALID, f"a quote is in the catalog's currency, {catalog.catalog.currency}")
    if not expires_at <= LAST_INSTANT:
        raise NotSoldError(SaleCode.INVALID, "expires_at is outside the calendar")
    return {
        "credits": credits_micro, "price": price.minor, "currency": price.currency, "expires_at": expires_at,
        "actor": _named(actor),
    }  # fmt: skip


def _named(actor: str) -> str:
    try:
        return msgspec.convert(actor, Text)
    except msgspec.ValidationError as error:
        raise NotSoldError(SaleCode.INVALID, f"actor: {error}") from None


def _line(row: Sequence[Any]) -> OrderLine:
    (id, account, status, pack, asked, credits, minor, currency, expires_at, actor, note, created_at, quoted_at,
     session, paid_by, is_over) = row  # fmt: skip
    return OrderLine(
        id=id,
        account=account,
        status=status,
        pack=pack,
        asked=None if asked is None else format_amount(asked),
        credits=None if credits is None else format_amount(credits),
        price=None if minor is None else str(Money(minor, currency)),
        expires_at=expires_at,
        is_over=bool(is_over),
        actor=actor,
        note=note,
        created_at=created_at,
        quoted_at=quoted_at,
        session=session,
        paid_by=paid_by,
    )
