"""Tasks that sell: a checkout of the provider's, its portal, an inquiry for a quote (payments: selling)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from uuid import uuid4

import msgspec
import psycopg
from celery import shared_task
from celery.utils.log import get_task_logger
from psycopg import Connection

from creditlane.amounts import parse_amount
from creditlane.contract import VERSION, Name, Text
from creditlane.selling import Inquiry, Ordered, Page, SaleAnswer, SaleCode
from models.database import connect
from models.in_force import catalog_in_force
from models.orders import NotSoldError, inquire, place
from models.settings import settings
from workers.selling import Order, Url, check_page, customer_of, open_checkout
from workers.stripe_api import StripeApi, StripeRefusedError, UnavailableError, make_stripe_api

logger = get_task_logger(__name__)

RETRIES: dict[str, Any] = {
    "autoretry_for": (psycopg.OperationalError, UnavailableError),
    "max_retries": 3,
    "retry_backoff": 1,
    "retry_backoff_max": 4,
    "retry_jitter": True,
}

Body = TypeVar("Body", bound=msgspec.Struct)


class PortalVisit(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What ``payments.portal`` is sent."""

    account: Name
    return_url: Url

    def __post_init__(self) -> None:
        check_page(self.return_url, "return_url")


class Question(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What ``payments.inquire`` is sent."""

    account: Name
    request: Name
    credits: int | str
    pack: Name | None = None
    note: Text | None = None


class PackOrder(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What ``payments.order`` is sent."""

    account: Name
    pack: Name
    request: Name


@shared_task(name="payments.checkout", **RETRIES)
def checkout(
    account: str,
    success_url: str,
    cancel_url: str,
    request: str,
    pack: str | None = None,
    plan: str | None = None,
    offer: str | None = None,
    quote: str | None = None,
    quantity: int = 1,
    v: int = 1,
) -> dict[str, Any]:
    """Make a checkout for a pack, a plan, an offer or a quote of an account's.

    :param success_url: where the buyer goes after paying: ``https://``, or ``http://`` on loopback.
    :param cancel_url: where the buyer goes who does not.
    :param request: chosen by the caller, who keeps it: with the same one, the same checkout is answered for a day.
    :param quantity: how many packs.
    :param v: the contract's version.
    :returns: a :class:`creditlane.selling.Page` as JSON has it.
    :raises ValueError: for a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away.
    :raises UnavailableError: when the provider does.
    """

    def sell() -> SaleAnswer:
        wanted = _read(Order, account=account, success_url=success_url, cancel_url=cancel_url, request=request,
                       pack=pack, plan=plan, offer=offer, quote=quote, quantity=quantity)  # fmt: skip
        api, config = _api(), settings()
        with _database() as connection:
            catalog = catalog_in_force(connection)
            return open_checkout(connection, api, catalog, wanted, livemode=config.payments_livemode)

    return _answer(sell, v)


@shared_task(name="payments.portal", **RETRIES)
def portal(account: str, return_url: str, v: int = 1) -> dict[str, Any]:
    """Open the provider's portal, where a buyer changes or cancels a plan and how it is paid for.

    :param return_url: where the buyer goes from there: ``https://``, or ``http://`` on loopback.
    :param v: the contract's version.
    :returns: a :class:`creditlane.selling.Page` as JSON has it, good for a few minutes.
    :raises ValueError: for a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away.
    :raises UnavailableError: when the provider does.
    """

    def visit() -> SaleAnswer:
        wanted = _read(PortalVisit, account=account, return_url=return_url)
        api = _api()
        with _database() as connection:
            customer = customer_of(connection, wanted.account, livemode=settings().payments_livemode)
        if customer is None:
            raise NotSoldError(SaleCode.NO_CUSTOMER)
        # A portal's address is good for minutes: an earlier one, answered again, would lead nowhere.
        made = api.create_portal(customer, wanted.return_url, f"portal-{uuid4().hex}")
        return Page(status="done", url=made["url"], id=made["id"])

    return _answer(visit, v)


@shared_task(name="payments.inquire", **RETRIES)
def ask(
    account: str, credits: int | str, request: str, pack: str | None = None, note: str | None = None, v: int = 1
) -> dict[str, Any]:
    """Ask an administrator for a quote.

    :param credits: how many, as an integer or a decimal string.
    :param request: chosen by the caller, who keeps it: with the same one there is one inquiry.
    :param pack: of those that are sold by quote; may be left out where there is one.
    :param note: the buyer's word to who quotes.
    :param v: the contract's version.
    :returns: a :class:`creditlane.selling.Inquiry` as JSON has it.
    :raises ValueError: for a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away.
    """

    def note_down() -> SaleAnswer:
        wanted = _read(Question, account=account, credits=credits, request=request, pack=pack, note=note)
        try:
            credits_micro = parse_amount(wanted.credits)
        except ValueError as error:
            raise NotSoldError(SaleCode.INVALID, f"credits: {error}") from None
        with _database() as connection:
            made = inquire(connection, wanted.account, credits_micro, catalog_in_force(connection),
                           request=wanted.request, pack=wanted.pack, note=wanted.note)  # fmt: skip
        return Inquiry(status="done", order=made.id)

    return _answer(note_down, v)


@shared_task(name="payments.order", **RETRIES)
def order_pack(account: str, pack: str, request: str, v: int = 1) -> dict[str, Any]:
    """Order a pack at the catalog's price, to be paid by a provider that takes no price ids.

    :param request: chosen by the caller, who keeps it: with the same one there is one order.
    :param v: the contract's version.
    :returns: a :class:`creditlane.selling.Ordered` as JSON has it.
    :raises ValueError: for a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away.
    """

    def note_down() -> SaleAnswer:
        wanted = _read(PackOrder, account=account, pack=pack, request=request)
        with _database() as connection:
            made = place(connection, wanted.account, wanted.pack, catalog_in_force(connection),
                         request=wanted.request)  # fmt: skip
        return Ordered(status="done", order=made.id, price=made.price, expires_at=made.expires_at)

    return _answer(note_down, v)


def _read(kind: type[Body], **given: Any) -> Body:
    """Check what a task was sent.

    :raises NotSoldError: naming what does not fit.
    """
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise NotSoldError(SaleCode.INVALID, str(error)) from None


def _api() -> StripeApi:
    api = make_stripe_api(settings())
    if api is None:
        raise NotSoldError(SaleCode.NOT_CONFIGURED)
    return api


def _database() -> Connection[Any]:
    return connect(settings().database_url.get_secret_value(), "creditlane selling", read_only=False)


def _answer(work: Callable[[], SaleAnswer], v: int) -> dict[str, Any]:
    """Do it, and give the answer as JSON has it; a refusal is one."""
    if v != VERSION:
        raise ValueError(f"the message is of contract version {v!r}, this side knows {VERSION}")
    try:
        answer = work()
    except NotSoldError as error:
        answer = SaleAnswer(status="rejected", code=error.code, reason=error.reason)
    except StripeRefusedError as error:
        logger.warning("the provider refused: %s", error.code)
        answer = SaleAnswer(
            status="rejected", code=SaleCode.PROVIDER_REFUSED, reason=f"the provider refused it: {error.code}"
        )
    told: dict[str, Any] = msgspec.to_builtins(answer)
    return told
