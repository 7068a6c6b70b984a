"""Reading a catalog file, and checking it whole."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

import msgspec

from creditlane.amounts import Micro, parse_amount
from models.rules.catalog import Achievement, Catalog, Feature, Money, Offer, Pack, Plan

Kind = TypeVar("Kind")

DEFAULT_CATALOG = "packs"
"""The one in force unless a setting says otherwise."""

SHIPPED = Path(__file__).parent / "catalogs"
"""Where the catalogs that come with the project are."""


class CatalogError(ValueError):
    """A catalog that cannot be used; the text names the file, the key and the reason."""


def load_catalog(name: str) -> Catalog:
    """Load a shipped catalog by its name, or one from a TOML file by its path.

    :raises CatalogError: with file, key and reason.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = SHIPPED / f"{name}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
        raise CatalogError(f"{path}: cannot be read ({error}); shipped catalogs: {shipped}") from None
    return parse_catalog(text, str(path))


def parse_catalog(text: str, file: str) -> Catalog:
    """Read and check a catalog.

    :param file: what to call it in errors.
    :raises CatalogError: with file, key and reason.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CatalogError(f"{file}: not TOML: {error}") from None
    for section, kind in (
        ("features", Feature), ("packs", Pack), ("plans", Plan), ("offers", Offer), ("achievements", Achievement),
    ):  # fmt: skip
        entries = tables.get(section)
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            _convert(entry, kind, file, f"{section}.{name}")
    catalog = _convert(tables, Catalog, file, "")
    zones = {"catalog.zone": catalog.catalog.zone}
    zones.update((f"plans.{name}.zone", plan.zone) for name, plan in catalog.plans.items() if plan.zone is not None)
    for key, zone in zones.items():
        try:
            ZoneInfo(zone)
        except (KeyError, ValueError, OSError):
            raise CatalogError(f"{file}: {key}: no such IANA time zone") from None
    for name, feature in catalog.features.items():
        for other in feature.alternatives:
            if other not in catalog.features:
                raise CatalogError(f"{file}: features.{name}.alternatives: there is no feature {other!r}")
    _check_selling(catalog, file)
    return catalog


def _check_selling(catalog: Catalog, file: str) -> None:
    """Check what of packs, plans and offers only the whole catalog can tell.

    :raises CatalogError: with file, key and reason.
    """
    for name, pack in catalog.packs.items():
        for number, grant in enumerate(pack.grants):
            for feature in grant.features or ():
                if feature not in catalog.features:
                    raise CatalogError(
                        f"{file}: packs.{name}.grants[{number}].features: there is no feature {feature!r}"
                    )
    for name, offer in catalog.offers.items():
        offered = catalog.packs.get(offer.pack)
        if offered is None or offered.price is None:
            raise CatalogError(f"{file}: offers.{name}.pack: there is no pack {offer.pack!r} with a price")
        if Money.parse(offer.price).currency != Money.parse(offered.price).currency:
            raise CatalogError(f"{file}: offers.{name}.price: not in the currency of its pack")
    known: dict[str, str] = {}
    sections: tuple[tuple[str, Mapping[str, Pack | Plan | Offer]], ...] = (
        ("packs", catalog.packs), ("plans", catalog.plans), ("offers", catalog.offers),
    )  # fmt: skip
    for section, entries in sections:
        for name, entry in entries.items():
            key = f"{section}.{name}.prices"
            for price in entry.prices:
                if price in known:
                    raise CatalogError(f"{file}: {key}: {price!r} stands in {known[price]} already; it means one thing")
                known[price] = key


def _convert(value: Any, kind: type[Kind], file: str, key: str) -> Kind:
    try:
        return msgspec.convert(value, kind, dec_hook=_decode_hook)
    except msgspec.ValidationError as error:
        reason, found, place = str(error).rpartition(" - at `$")
        if not found:
            reason, place = str(error), ""
        where = (key + place.rstrip("`")).lstrip(".")
        raise CatalogError(f"{file}: {where}: {reason}" if where else f"{file}: {reason}") from None


def _decode_hook(kind: type, value: Any) -> Any:
    if kind is Micro:
        return Micro(parse_amount(value))
    raise NotImplementedError(kind)
