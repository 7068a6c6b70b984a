"""Reading a catalog file, and checking it whole."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, get_origin
from zoneinfo import ZoneInfo

import msgspec

from creditlane.amounts import Micro, parse_amount
from models.rules.catalog import Catalog, Money, Offer, Pack, Plan

DEFAULT_CATALOG = "packs"
"""The one in force unless a setting says otherwise."""

SHIPPED = Path(__file__).parent / "catalogs"
"""Where the catalogs that come with the project are."""

SECTIONS = {field.encode_name: field.type for field in msgspec.structs.fields(Catalog)}
"""What a catalog consists of, and the type of each; a ``dict`` where it has entries by name."""


class Problem(NamedTuple):
    """One thing that is wrong with a catalog."""

    key: str
    """Where, such as ``packs.pro.price``; empty for what is wrong with the file."""
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.key else self.reason


class CatalogError(ValueError):
    """A catalog that cannot be used; the text names the file, and key and reason of everything that is wrong.

    :param problems: the same one by one.
    """

    def __init__(self, text: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(text)
        self.problems = tuple(problems)


class CatalogText(NamedTuple):
    """A catalog, and the text that it was read from."""

    catalog: Catalog
    text: str


def shipped_names() -> list[str]:
    """The catalogs that come with the project."""
    return sorted(file.stem for file in SHIPPED.glob("*.toml"))


def catalog_path(name: str) -> Path:
    """The file of a shipped catalog by its name, or of one that is given by its path."""
    path = Path(name)
    return path if path.suffix == ".toml" else SHIPPED / f"{name}.toml"


def read_catalog(name: str) -> CatalogText:
    """Load a shipped catalog by its name, or one from a TOML file by its path, with its text.

    :raises CatalogError: with file, key and reason.
    """
    path = catalog_path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        shipped = ", ".join(shipped_names())
        raise refusal(str(path), [Problem("", f"cannot be read ({error}); shipped catalogs: {shipped}")]) from None
    return CatalogText(parse_catalog(text, str(path)), text)


def load_catalog(name: str) -> Catalog:
    """Load a shipped catalog by its name, or one from a TOML file by its path.

    :raises CatalogError: with file, key and reason.
    """
    return read_catalog(name).catalog


def parse_catalog(text: str, file: str) -> Catalog:
    """Read and check a catalog.

    :param file: what to call it in errors.
    :raises CatalogError: with file, and key and reason of all that is wrong.
    """
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is no error of its own to it
        raise refusal(file, [Problem("", f"not TOML: {error}")]) from None
    return check_catalog(tables, file)


def check_catalog(tables: Mapping[str, Any], file: str) -> Catalog:
    """Check what was read from a catalog file.

    :param tables: its values as TOML has them.
    :param file: what to call it in errors.
    :raises CatalogError: with file, and key and reason of all that is wrong.
    """
    problems = list(_entry_problems(tables)) or list(_problems_of(tables, Catalog, "", "$"))
    if not problems:
        catalog = msgspec.convert(tables, Catalog, dec_hook=_decode_hook)
        problems = list(_whole_problems(catalog))
        if not problems:
            return catalog
    raise refusal(file, problems)


def refusal(file: str, problems: Sequence[Problem]) -> CatalogError:
    """The error of a catalog that has problems; all on one line, as a log has it.

    :param problems: at least one.
    """
    return CatalogError(f"{file}: {'; '.join(map(str, problems))}", problems)


def _entry_problems(tables: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong within each section and each entry; of one of them the first, where the types stop."""
    for section, value in tables.items():
        kind = SECTIONS.get(section)
        if kind is None:
            near = get_close_matches(section, SECTIONS, 1)
            hint = f"do you mean {near[0]}?" if near else f"there are {', '.join(SECTIONS)}"
            yield Problem(section, f"unknown section; {hint}")
        elif get_origin(kind) is dict and isinstance(value, dict):
            for name, entry in value.items():
                yield from _problems_of({name: entry}, kind, f"{section}.{name}", "$[...]")
        else:
            yield from _problems_of(value, kind, section, "$")


def _problems_of(value: Any, kind: Any, key: str, root: str) -> Iterator[Problem]:
    """What is wrong with a value.

    :param key: what it is called in the file.
    :param root: what it is called in errors of its type.
    """
    try:
        msgspec.convert(value, kind, dec_hook=_decode_hook)
    except msgspec.ValidationError as error:
        reason, found, place = str(error).rpartition(" - at `")
        inner = place.rstrip("`").removeprefix(root) if found and place.startswith(root) else ""
        yield Problem(f"{key}{inner}".lstrip("."), reason if found else str(error))


def _whole_problems(catalog: Catalog) -> Iterator[Problem]:
    """What only the whole catalog can tell."""
    zones = {"catalog.zone": catalog.catalog.zone}
    zones.update((f"plans.{name}.zone", plan.zone) for name, plan in catalog.plans.items() if plan.zone is not None)
    for key, zone in zones.items():
        try:
            ZoneInfo(zone)
        except (KeyError, ValueError, OSError):
            yield Problem(key, "no such IANA time zone")
    named = {f"features.{name}.alternatives": feature.alternatives for name, feature in catalog.features.items()}
    for name, pack in catalog.packs.items():
        for number, grant in enumerate(pack.grants):
            named[f"packs.{name}.grants[{number}].features"] = grant.features or []
    for key, features in named.items():
        for feature in features:
            if feature not in catalog.features:
                yield Problem(key, f"there is no feature {feature!r}")
    for name, offer in catalog.offers.items():
        offered = catalog.packs.get(offer.pack)
        if offered is None or offered.price is None:
            yield Problem(f"offers.{name}.pack", f"there is no pack {offer.pack!r} with a price")
        elif Money.parse(offer.price).currency != Money.parse(offered.price).currency:
            yield Problem(f"offers.{name}.price", "not in the currency of its pack")
    yield from _price_problems(catalog)


def _price_problems(catalog: Catalog) -> Iterator[Problem]:
    """Prices of payment providers that stand for two things."""
    known: dict[str, str] = {}
    sections: tuple[tuple[str, Mapping[str, Pack | Plan | Offer]], ...] = (
        ("packs", catalog.packs), ("plans", catalog.plans), ("offers", catalog.offers),
    )  # fmt: skip
    for section, entries in sections:
        for name, entry in entries.items():
            key = f"{section}.{name}.prices"
            for price in entry.prices:
                if price in known:
                    yield Problem(key, f"{price!r} stands in {known[price]} already; it means one thing")
                known[price] = key


def _decode_hook(kind: type, value: Any) -> Any:
    if kind is Micro:
        return Micro(parse_amount(value))
    raise NotImplementedError(kind)
