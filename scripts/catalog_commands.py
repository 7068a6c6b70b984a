"""``creditlane catalog``: check a catalog's file, look at one, compare two, and work out what something costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, TypeVar

import psycopg
import typer
from psycopg import Connection
from rich.console import Group, RenderableType
from rich.table import Table

from creditlane.amounts import format_amount, parse_amount
from models.catalog import CatalogError, Problem, load_catalog, parse_catalog, shipped_names
from models.catalog_changes import Change, compare, summary, values
from models.catalog_prices import Quoted, Rate, price_words, quote, rates
from models.catalog_texts import KeptText, check_kept, kept_texts
from models.rules.catalog import Catalog, Money, Plan
from scripts.command_parts import (
    FAULTS,
    USAGE,
    ConfigurationError,
    JsonOption,
    deployment,
    examples,
    fail,
    ledger,
    show_json,
)
from scripts.showing import console, facts_table, instant, plain_table, said

catalog_app = typer.Typer(
    help="Catalogs: check a file before it is put in force, look at one, compare two, work out prices.",
    no_args_is_help=True,
    epilog=examples(
        "creditlane catalog check mine.toml",
        "creditlane catalog show",
        "creditlane catalog diff mine-3 mine.toml",
        "creditlane catalog price image 12",
    ),
)

NAME_HELP = "A shipped catalog's name, the path of a TOML file, or the label of one that was in force, such as packs-1."

NameArgument = Annotated[
    str | None,
    typer.Argument(metavar="[NAME]", help=f"{NAME_HELP} The one in force unless given.", show_default=False),
]

Found = TypeVar("Found")


# --- Check -------------------------------------------------------------------------------------------


@catalog_app.command(
    "check",
    epilog=examples(
        "creditlane catalog check mine.toml",
        "creditlane catalog check mine.toml --ledger",
        "creditlane catalog check *.toml --json | jq '.[].problems'",
    )
    + "\n\n[bold]Exit codes[/]\n0  all are good\n1  one is not; every problem is named with file, key and reason",
)
def catalog_check(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="TOML files, or names of shipped ones.", show_default=False)
    ],
    used: Annotated[
        bool,
        typer.Option("--ledger", help="Ask the ledger as well whether other content was used under its version."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check catalog files whole: every key that is unknown, every value that makes no sense."""
    checked = [_check(file, used) for file in files]
    if as_json:
        show_json([
            {"file": file, "label": label, "good": not problems,
             "problems": [{"key": problem.key, "reason": problem.reason} for problem in problems]}
            for file, label, problems in checked
        ])  # fmt: skip
    else:
        out = console()
        for file, label, problems in checked:
            if not problems:
                out.print(f"[green]good[/]  {said(file)}: {said(label)}", soft_wrap=True)
            for problem in problems:
                out.print(f"[red]wrong[/] {said(file)}: {said(problem)}", soft_wrap=True)
    if any(problems for _, _, problems in checked):
        raise typer.Exit(FAULTS)


def _check(file: str, used: bool) -> tuple[str, str | None, Sequence[Problem]]:
    label = None
    try:
        catalog = load_catalog(file)
        label = catalog.label
        if used:
            with ledger() as connection:
                check_kept(connection, catalog, file)
    except CatalogError as error:
        return file, label, error.problems
    return file, label, ()


# --- Show --------------------------------------------------------------------------------------------


@catalog_app.command(
    "show",
    epilog=examples(
        "creditlane catalog show",
        "creditlane catalog show tiers",
        "creditlane catalog show packs-1",
        "creditlane catalog show mine.toml --json | jq .values.features",
    ),
)
def catalog_show(name: NameArgument = None, as_json: JsonOption = False) -> None:
    """Show a catalog: features with their prices, plans, packs with the price of a credit, offers, limits, notices."""
    kept = _from_ledger(kept_texts)
    catalog = _find(name, kept)
    mine = [each for each in kept or () if each.label.rpartition("-")[0] == catalog.catalog.name]
    state = "unknown" if kept is None else _state(catalog, mine)
    now = datetime.now(UTC)
    if as_json:
        show_json(
            {
                "label": catalog.label,
                "state": state,
                "used": [{"label": each.label, "first_used_at": each.first_used_at} for each in mine],
                "values": values(catalog),
                "per_credit": rates(catalog, now=now),
            }
        )
    else:
        console().print(catalog_lines(catalog, state, mine, now))


def _state(catalog: Catalog, kept: Sequence[KeptText]) -> str:
    """How the ledger knows it: ``used``, ``unused``, or ``other``, where its version was used with other content."""
    for each in kept:
        if each.label == catalog.label:
            return "other" if compare(parse_catalog(each.text, each.label), catalog) else "used"
    return "unused"


STATES = {
    "used": "[green]used since {}[/]",
    "unused": "[yellow]nothing was applied under it yet[/]",
    "other": "[red]no: other content was used under this version since {}; raise it[/]",
    "unknown": "[dim]the ledger cannot be asked[/]",
}
"""How the ledger knows a catalog, in words."""


def catalog_lines(catalog: Catalog, state: str, kept: Sequence[KeptText], now: datetime) -> RenderableType:
    """A catalog for people.

    :param state: one of :data:`STATES`.
    :param kept: its versions that the ledger knows.
    """
    parts: list[RenderableType] = [facts_table(_facts(catalog, state, kept))]
    for table in (_features(catalog), _plans(catalog), _packs(catalog), _offers(catalog, now)):
        if table.row_count:
            parts += ["", table]
    rest = list(_policies(catalog))
    if rest:
        parts += ["", facts_table(rest)]
    return Group(*parts)


def _facts(catalog: Catalog, state: str, kept: Sequence[KeptText]) -> Iterator[tuple[str, str]]:
    about = catalog.catalog
    yield "catalog", f"[bold]{said(catalog.label)}[/], {about.currency}, days of {said(about.zone)}"
    since = next((each.first_used_at for each in kept if each.label == catalog.label), None)
    yield "in the ledger", STATES[state].format(f"{instant(since)} UTC")
    others = [f"{said(each.label)} ({instant(each.first_used_at)})" for each in kept if each.label != catalog.label]
    if others:
        yield "other versions", ", ".join(others)
    for name, welcome in (("sign-up", catalog.signup), ("lead", catalog.lead)):
        if welcome.credits:
            yield name, f"{format_amount(welcome.credits)} credits{_life(welcome.expires_days)}"
    if catalog.lead.per_user is not None:
        yield "leads of a user", f"{catalog.lead.per_user} at the most"
    if catalog.priorities:
        order = sorted(catalog.priorities.items(), key=lambda each: each[1])
        yield "spent first", ", ".join(f"{said(source)} {priority}" for source, priority in order)


def _life(days: int | None) -> str:
    return "" if days is None else f", for {days} days"


def _features(catalog: Catalog) -> Table:
    table = _table("Features", "feature", "title", "credits", "one costs", "cheaper ones", right=("one costs",))
    for name, feature in catalog.features.items():
        one = quote(catalog, name, parse_amount(1))
        table.add_row(
            said(name), said(feature.title), price_words(feature), _range(one), said(", ".join(feature.alternatives))
        )
    return table


def _range(quoted: Quoted) -> str:
    """What something costs in money, from the cheapest pack's rate to the dearest's."""
    if quoted.money_from is None or quoted.money_to is None:
        return ""
    low, high = _decimal(quoted.money_from), _decimal(quoted.money_to)
    return f"{low if low == high else f'{low} to {high}'} {quoted.currency}"


def _decimal(amount: Decimal) -> str:
    """Money to four decimals, which shows the rates of credits apart."""
    return f"{amount:.4f}"


def _plans(catalog: Catalog) -> Table:
    table = _table(
        "Plans", "plan", "title", "credits a month", "price", "a credit", "at the period's end", "trial",
        right=("credits a month", "price", "a credit"),
    )  # fmt: skip
    per_credit = _per_credit(catalog, "plan")
    for name, plan in catalog.plans.items():
        table.add_row(
            said(name),
            said(plan.title),
            "unlimited" if plan.unlimited else format_amount(plan.monthly_credits),
            "" if plan.price is None else f"{Money.parse(plan.price)} a {plan.interval}",
            per_credit.get(name, ""),
            _end(plan),
            "" if plan.trial_days is None else f"{plan.trial_days} days, {format_amount(plan.trial_credits)} credits",
        )
    return table


def _end(plan: Plan) -> str:
    if plan.unlimited and not plan.monthly_credits:
        return ""
    if plan.mode == "reset":
        return "what is left expires"
    if plan.mode == "accumulate":
        return "nothing expires"
    cap = f"at most {plan.rollover_cap}" if plan.balance_cap is None else f"at most {plan.balance_cap} with the new"
    months = "" if plan.rollover_months is None else f", for {plan.rollover_months} months"
    return f"rolls over, {cap}{months}"


def _per_credit(catalog: Catalog, kind: str, now: datetime | None = None) -> dict[str, str]:
    return {rate.name: _decimal(rate.per_credit) for rate in rates(catalog, now=now) if rate.kind == kind}


def _packs(catalog: Catalog) -> Table:
    table = _table(
        "Packs", "pack", "title", "price", "credits", "for", "live", "a credit", right=("price", "credits", "a credit")
    )
    per_credit = _per_credit(catalog, "pack")
    for name, pack in catalog.packs.items():
        if pack.quote_above is not None:
            above = f"above {format_amount(pack.quote_above)}"
            table.add_row(said(name), said(pack.title), "by quote", above, "all", _days(pack.expires_days), "")
        for number, lot in enumerate(pack.lots):
            scope = "all" if lot.features is None else said(", ".join(lot.features))
            head = (said(name), said(pack.title), str(pack.price)) if not number else ("", "", "")
            each = per_credit.get(name, "") if not number else ""
            table.add_row(*head, format_amount(lot.credits_micro), scope, _days(lot.expires_days), each)
    return table


def _days(days: int | None) -> str:
    return "for ever" if days is None else f"{days} days"


def _offers(catalog: Catalog, now: datetime) -> Table:
    table = _table(
        "Offers", "offer", "title", "pack", "price", "instead of", "from (UTC)", "until (UTC)", "each account", "now",
        right=("price", "instead of"),
    )  # fmt: skip
    for name, offer in catalog.offers.items():
        over = offer.ends_at is not None and offer.ends_at <= now
        state = "[green]runs[/]" if offer.runs_at(now) else "[dim]over[/]" if over else "[yellow]not yet[/]"
        times = "" if offer.per_account is None else f"{offer.per_account} times"
        table.add_row(
            said(name), said(offer.title), said(offer.pack), offer.price, str(catalog.packs[offer.pack].price),
            instant(offer.begins_at), instant(offer.ends_at), times, state,
        )  # fmt: skip
    return table


def _policies(catalog: Catalog) -> Iterator[tuple[str, str]]:
    """The sections without entries, and those with small ones, where they say anything beyond the defaults."""
    for section in ("gifts", "referrals", "pools", "notify", "refunds", "clawback", "retention"):
        words = summary(getattr(catalog, section))
        if words:
            yield section, said(words)
    for name, achievement in catalog.achievements.items():
        bonus = f", {format_amount(achievement.credits)} credits" if achievement.credits else ""
        what = "credits used" if achievement.measure == "used" else "referrals"
        mark = format_amount(achievement.at)
        yield f"achievement {said(name)}", f"{mark} {what}{bonus}{_life(achievement.expires_days)}"
    for name in catalog.sources:
        yield f"source {said(name)}", "may be given away" if catalog.is_transferable(name) else "stays where it is"


def _table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    return plain_table(*columns, right=right, title=title, title_justify="left", title_style="dim")


# --- Diff --------------------------------------------------------------------------------------------


@catalog_app.command(
    "diff",
    epilog=examples(
        "creditlane catalog diff packs-1 mine.toml",
        "creditlane catalog diff old.toml new.toml --json | jq '.changes[].key'",
    )
    + "\n\n[bold]Exit codes[/]\n0  the new one may take the old one's place\n"
    "1  they differ under one version, and no worker would take the new one: raise its version",
)
def catalog_diff(
    old: Annotated[str, typer.Argument(metavar="OLD", help=NAME_HELP, show_default=False)],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Likewise.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Compare two catalogs key by key, and say what each change means for accounts that are there."""
    kept: list[KeptText] = []
    if not all(map(_is_file, (old, new))):
        with ledger() as connection:
            kept = kept_texts(connection)
    before, after = _find(old, kept), _find(new, kept)
    changes = compare(before, after)
    clashes = bool(changes) and before.label == after.label
    if as_json:
        show_json(
            {
                "old": before.label,
                "new": after.label,
                "same_version": clashes,
                "changes": [
                    {"key": each.key, "kind": each.kind, "old": each.old, "new": each.new, "meaning": each.meaning}
                    for each in changes
                ],
            }
        )
    else:
        console().print(diff_lines(before, after, changes))
        if clashes:
            console(stderr=True).print(
                f"[red]warning:[/] both are {said(before.label)}: workers refuse other content under a version that"
                " was used; raise version",
                soft_wrap=True,
            )
        elif before.catalog.name == after.catalog.name and after.catalog.version < before.catalog.version:
            console(stderr=True).print("[yellow]note:[/] the new one has a lower version", soft_wrap=True)
    if clashes:
        raise typer.Exit(FAULTS)


SIGNS = {"added": "[green]+[/]", "removed": "[red]-[/]", "changed": "[yellow]~[/]"}


def diff_lines(before: Catalog, after: Catalog, changes: Sequence[Change]) -> RenderableType:
    """What differs, for people."""
    head = f"[bold]{said(before.label)}[/] → [bold]{said(after.label)}[/]"
    if not changes:
        return f"{head}: they say the same"
    table = plain_table("", "key", "from", "to", "counts")
    for each in changes:
        table.add_row(SIGNS[each.kind], said(each.key), said(each.old or ""), said(each.new or ""), said(each.meaning))
    return Group(head, table)


# --- Price -------------------------------------------------------------------------------------------


@catalog_app.command(
    "price",
    epilog=examples(
        "creditlane catalog price image 1 8 12",
        "creditlane catalog price chat 30 --plan plus --catalog tiers",
        "creditlane catalog price image 12 --json | jq -r '.prices[].credits'",
    ),
)
def catalog_price(
    feature: Annotated[str, typer.Argument(metavar="FEATURE", help="Of the catalog.", show_default=False)],
    quantities: Annotated[
        list[str], typer.Argument(metavar="QUANTITY...", help="How much of it; one or several.", show_default=False)
    ],
    plan: Annotated[
        str | None, typer.Option("--plan", help="Of an account that has this plan.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option("--catalog", help=f"{NAME_HELP} The one in force unless given.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Work out what quantities of a feature cost: in credits, by which rule, and in money as credits are sold now."""
    catalog = _find(name, None if name is None or _is_file(name) else _from_ledger(kept_texts))
    if feature not in catalog.features:
        fail(f"{catalog.label} has no feature {feature!r}; it has: {', '.join(catalog.features)}", USAGE)
    if plan is not None and plan not in catalog.plans:
        fail(f"{catalog.label} has no plan {plan!r}; it has: {', '.join(catalog.plans)}", USAGE)
    now = datetime.now(UTC)
    try:
        found = [quote(catalog, feature, _quantity(text), plan, now) for text in quantities]
    except ValueError as error:
        fail(str(error), USAGE)
    ways = [rate for rate in rates(catalog, feature, now) if rate.kind != "plan" or rate.name == plan]
    if as_json:
        show_json({"catalog": catalog.label, "plan": plan, "prices": found, "per_credit": ways})
    else:
        console().print(price_lines(catalog, feature, found, ways))


def _quantity(text: str) -> int:
    """Read a quantity, in millionths.

    :raises ValueError: for what no operation would take.
    """
    micro = parse_amount(text)
    if micro <= 0:
        raise ValueError("a quantity is more than 0")
    return micro


def price_lines(catalog: Catalog, feature: str, found: Sequence[Quoted], ways: Sequence[Rate]) -> RenderableType:
    """What quantities cost, for people, and what a credit does."""
    priced = catalog.features[feature]
    facts = [("feature", f"[bold]{said(feature)}[/] {said(priced.title)}".rstrip()), ("price", price_words(priced)),
             ("catalog", said(catalog.label))]  # fmt: skip
    if priced.alternatives:
        facts.append(("cheaper ones", said(", ".join(priced.alternatives))))
    table = plain_table("quantity", "credits", "because", "in money", right=("quantity", "credits", "in money"))
    for each in found:
        table.add_row(each.quantity, f"[bold]{each.credits}[/]", said(each.rule), _range(each))
    parts: list[RenderableType] = [facts_table(facts), "", table]
    if ways:
        bought = _table("A credit for it, the cheapest first", "by", "price", "credits", "a credit",
                        right=("price", "credits", "a credit"))  # fmt: skip
        for way in ways:
            each_costs = f"{_decimal(way.per_credit)} {way.currency}"
            bought.add_row(f"{way.kind} {said(way.name)}", way.price, way.credits, each_costs)
        parts += ["", bought]
    return Group(*parts)


# --- Where a catalog is ------------------------------------------------------------------------------


def _is_file(name: str) -> bool:
    """Whether a catalog is found without the ledger: by a path, or among those that are shipped."""
    return name.endswith(".toml") or name in shipped_names()


def _find(name: str | None, kept: Sequence[KeptText] | None) -> Catalog:
    """A catalog by what an operator calls it.

    :param kept: those that the ledger knows; None where it was not to be asked, or is away.
    :raises CatalogError: when there is none, or it cannot be used.
    """
    if name is None:
        return deployment().catalog
    for each in kept or ():
        if each.label == name and not _is_file(name):
            return parse_catalog(each.text, name)
    return load_catalog(name)


def _from_ledger(read: Callable[[Connection[Any]], Found]) -> Found | None:
    """Ask the ledger for what is good to know and can be done without; None where it is nowhere, or away."""
    try:
        with ledger() as connection:
            return read(connection)
    except (ConfigurationError, psycopg.OperationalError, psycopg.errors.UndefinedTable):
        return None
