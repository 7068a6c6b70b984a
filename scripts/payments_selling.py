"""``creditlane payments inquiries``, ``quote``, ``withdraw``, ``checkout``: what an operator does to sell credits."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, NoReturn
from uuid import uuid4

import typer
from psycopg import Connection

from creditlane.amounts import parse_amount
from creditlane.client import SELLING_SECONDS, CreditClient
from creditlane.errors import NoAnswerError
from creditlane.selling import Page
from models.orders import NotSoldError, OrderLine, new_quote, open_orders, orders_of, quote, withdraw
from models.reading import DEFAULT_PAGE
from models.rules.catalog import Catalog, Money
from models.rules.state import Notice
from scripts.command_parts import (
    NO_ANSWER,
    REFUSED,
    USAGE,
    AccountArgument,
    JsonOption,
    LimitOption,
    WaitOption,
    deployment,
    examples,
    fail,
    ledger,
    operator,
    parse_instant,
    parse_span,
    show_json,
)
from scripts.showing import console, facts_table, instant, plain_table, said
from workers.ledger_writer import insert_notices

QUOTE_READY = "quote_ready"

GOOD_FOR = "30d"
"""How long a quote is good for unless its administrator says otherwise."""

selling_app = typer.Typer(
    help="Quotes and checkouts.",
    no_args_is_help=True,
    epilog=examples(
        "creditlane payments inquiries",
        'creditlane payments quote order.5f… --price "99.00 EUR"',
        "creditlane payments checkout alice --pack pro --success-url https://… --cancel-url https://…",
    ),
)

OrderArgument = Annotated[str, typer.Argument(metavar="ORDER", help="The order's id.", show_default=False)]
ActorOption = Annotated[str | None, typer.Option("--actor", help="Who; you unless given.", show_default=False)]


@selling_app.command(
    "inquiries",
    epilog=examples(
        "creditlane payments inquiries",
        "creditlane payments inquiries --account alice",
        "creditlane payments inquiries --json | jq .id",
    ),
)
def inquiries(
    account: Annotated[
        str | None, typer.Option(help="All orders of this account, the newest first.", show_default=False)
    ] = None,
    limit: LimitOption = DEFAULT_PAGE,
    as_json: JsonOption = False,
) -> None:
    """Show what was asked for and what was quoted but not paid, the oldest first."""
    with ledger() as connection:
        found = open_orders(connection, limit=limit) if account is None else orders_of(connection, account, limit=limit)
    if as_json:
        for each in found:
            show_json(each)
        return
    out = console()
    if not found:
        out.print("nobody asks for a quote" if account is None else f"[bold]{said(account)}[/] has no orders")
        return
    table = plain_table(
        "asked (UTC)", "order", "account", "status", "pack", "credits", "price", "until (UTC)", "note",
        right=("credits", "price"),
    )  # fmt: skip
    for each in found:
        table.add_row(
            instant(each.created_at), said(each.id), said(each.account), _status(each), said(each.pack),
            each.credits or each.asked or "", each.price or "", instant(each.expires_at), said(each.note or ""),
        )  # fmt: skip
    out.print(table)
    if any(each.status == "inquiry" for each in found):
        out.print('[dim]answer one: creditlane payments quote ORDER --price "99.00 EUR"[/]')


@selling_app.command(
    "quote",
    epilog=examples(
        'creditlane payments quote order.5f… --price "99.00 EUR"',
        'creditlane payments quote order.5f… --price "90.00 EUR" --credits 700 --good-for 14d',
        'creditlane payments quote --account alice --price "99.00 EUR" --credits 700 --until 2027-01-31',
    ),
)
def give_quote(
    price: Annotated[str, typer.Option(metavar="MONEY", help='What it costs, as "99.00 EUR".', show_default=False)],
    order: Annotated[
        str | None, typer.Argument(metavar="[ORDER]", help="The inquiry that it answers.", show_default=False)
    ] = None,
    account: Annotated[
        str | None, typer.Option(help="Whom to quote for without an inquiry, or anew.", show_default=False)
    ] = None,
    credits: Annotated[
        str | None,
        typer.Option(metavar="CREDITS", help="How many; as many as were asked for unless given.", show_default=False),
    ] = None,
    good_for: Annotated[
        str, typer.Option("--good-for", metavar="DURATION", help="How long it can be bought, such as 30d.")
    ] = GOOD_FOR,
    until: Annotated[
        str | None,
        typer.Option(metavar="INSTANT", help="Until when, in place of --good-for.", show_default=False),
    ] = None,
    pack: Annotated[
        str | None, typer.Option(help="Of --account: which of the packs sold by quote.", show_default=False)
    ] = None,
    note: Annotated[
        str | None, typer.Option(help="Of --account: a word that is kept with it.", show_default=False)
    ] = None,
    actor: ActorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quote a price for credits in a quantity of their own. A quote is never changed: withdraw it, and make another."""
    if (order is None) == (account is None):
        fail("give an ORDER to answer, or --account to quote without an inquiry: one of the two", USAGE)
    if order is not None and (pack is not None or note is not None):
        fail("--pack and --note go with --account: an inquiry has its own", USAGE)
    if account is not None and credits is None:
        fail("--account goes with --credits: nobody has said how many", USAGE)
    try:
        money = Money.parse(price)
        amount = None if credits is None else parse_amount(credits)
    except ValueError as error:
        fail(str(error), USAGE)
    try:
        end = datetime.now(UTC) + timedelta(seconds=parse_span(good_for)) if until is None else parse_instant(until)
    except OverflowError:
        fail("--good-for is longer than the calendar", USAGE)
    terms: dict[str, Any] = {"expires_at": end, "actor": actor or operator()}
    catalog = deployment().catalog
    with ledger(read_only=False) as connection, connection.transaction():
        try:
            if order is not None:
                made = quote(connection, order, money, catalog, credits_micro=amount, **terms)
            else:
                assert account is not None
                assert amount is not None
                made = new_quote(connection, account, amount, money, catalog, pack=pack, note=note, **terms)
        except NotSoldError as error:
            _refuse(error)
        _tell(connection, made, catalog)
    _show(made, as_json)


@selling_app.command("withdraw", epilog=examples("creditlane payments withdraw order.5f…"))
def withdraw_order(order: OrderArgument, actor: ActorOption = None, as_json: JsonOption = False) -> None:
    """Cancel an inquiry or a quote. Who has its checkout open may still pay for a day: such a payment is parked."""
    with ledger(read_only=False) as connection:
        try:
            found = withdraw(connection, order, actor=actor or operator())
        except NotSoldError as error:
            _refuse(error)
    _show(found, as_json)


@selling_app.command(
    "checkout",
    epilog=examples(
        "creditlane payments checkout alice --pack pro --success-url https://… --cancel-url https://…",
        "creditlane payments checkout alice --plan starter --success-url https://… --cancel-url https://…",
        "creditlane payments checkout alice --quote order.5f… --success-url https://… --cancel-url https://…",
    ),
)
def make_checkout(
    account: AccountArgument,
    success_url: Annotated[str, typer.Option(metavar="URL", help="Where who has paid goes.", show_default=False)],
    cancel_url: Annotated[str, typer.Option(metavar="URL", help="Where who has not goes.", show_default=False)],
    pack: Annotated[str | None, typer.Option(help="A pack of the catalog.", show_default=False)] = None,
    plan: Annotated[str | None, typer.Option(help="A plan of the catalog.", show_default=False)] = None,
    offer: Annotated[str | None, typer.Option(help="An offer of the catalog.", show_default=False)] = None,
    quote: Annotated[str | None, typer.Option(metavar="ORDER", help="A quote.", show_default=False)] = None,
    quantity: Annotated[int, typer.Option(min=1, help="How many packs.")] = 1,
    request: Annotated[
        str | None,
        typer.Option(
            help="The same one gives the same checkout for a day. One is made if it is not given.", show_default=False
        ),
    ] = None,
    wait: WaitOption = SELLING_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Make a checkout and print its address."""
    where = deployment()
    identity = request or str(uuid4())
    try:
        with CreditClient(
            where.broker_url, lanes=where.lanes, result_url=where.result_url, **where.tls_files
        ) as client:
            page = client.checkout(
                account, request=identity, success_url=success_url, cancel_url=cancel_url, pack=pack, plan=plan,
                offer=offer, quote=quote, quantity=quantity, wait=wait,
            )  # fmt: skip
    except NoAnswerError:
        fail(f"no answer within {wait:g} s; give the same command again with --request {identity}", NO_ANSWER)
    _show_page(page, as_json)


def _show_page(page: Page, as_json: bool) -> None:
    if as_json:
        show_json(page)
    elif page.is_done:
        console().print(said(page.url), soft_wrap=True)
        console(stderr=True).print(f"[dim]until {instant(page.expires_at)} UTC[/]")
    if not page.is_done:
        if not as_json:
            console(stderr=True).print(f"[red]refused:[/] {said(page.code)}: {said(page.reason)}", soft_wrap=True)
        raise typer.Exit(REFUSED)


def _show(order: OrderLine, as_json: bool) -> None:
    if as_json:
        show_json(order)
        return
    facts = [
        ("order", f"[bold]{said(order.id)}[/], {_status(order)}"),
        ("account", said(order.account)),
        ("credits", order.credits or order.asked or ""),
        ("price", order.price or ""),
        ("until", f"{instant(order.expires_at)} UTC" if order.expires_at is not None else ""),
        ("by", said(order.actor or "")),
    ]
    console().print(facts_table([(name, value) for name, value in facts if value]))


def _status(order: OrderLine) -> str:
    if order.is_over:
        return "[dim]over[/]"
    colour = {"inquiry": "yellow", "quoted": "green"}.get(order.status, "dim")
    return f"[{colour}]{order.status}[/]"


def _tell(connection: Connection[Any], order: OrderLine, catalog: Catalog) -> None:
    """Tell the account that its quote is ready, where the catalog has such notices. The sweep of notices sends it."""
    if QUOTE_READY not in catalog.notify.kinds:
        return
    assert order.quoted_at is not None
    details = {
        "order": order.id, "credits": order.credits, "price": order.price, "expires_at": order.expires_at,
    }  # fmt: skip
    notice = Notice(QUOTE_READY, f"{QUOTE_READY}:{order.id}", order.quoted_at, details)
    with connection.cursor() as cursor:
        insert_notices(cursor, [(order.account, notice)], catalog.notify.channels, order.quoted_at)


def _refuse(error: NotSoldError) -> NoReturn:
    fail(f"{error.code}: {error.reason}", REFUSED)
