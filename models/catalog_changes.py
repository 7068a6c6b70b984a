"""What differs between two catalogs, key by key, and what that means for accounts that are there already. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from creditlane.amounts import Micro, format_amount
from models.rules.catalog import Catalog

Path = tuple[str, ...]

TERMS = frozenset({
    "monthly_credits", "unlimited", "mode", "source", "rollover_source", "rollover_cap", "balance_cap",
    "rollover_months", "price", "interval", "grace_days", "upgrade",
})  # fmt: skip
"""What of a plan a subscription keeps until it is renewed: see :class:`models.rules.catalog.Terms`."""

MEANINGS: Mapping[str, str] = {
    "catalog": "of what is reckoned from then on; subscriptions keep their calendar",
    "signup": "of accounts that are opened from then on",
    "lead": "of leads that are opened from then on",
    "priorities": "of lots that are given from then on; those that are there keep theirs",
    "sources": "of transfers from then on",
    "features": "of charges that are applied from then on, and of captures by quantity of holds that are open",
    "packs": "of packs whose payment is read from then on",
    "plans": "of subscriptions that begin from then on",
    "offers": "of checkouts that are made from then on",
    "notify": "of what is told from then on",
    "clawback": "of what is taken back from then on",
    "refunds": "of what is given back from then on",
    "retention": "from the next daily run on, also of what is older",
    "gifts": "of what is given, and of codes that are issued or redeemed, from then on",
    "referrals": "of referrals that are rewarded from then on, also of codes that were claimed before",
    "pools": "of what members use from then on",
    "achievements": "of operations from then on; what was reached stays",
}
"""When a change takes effect, by section."""


@dataclass(frozen=True)
class Change:
    """One key that differs."""

    path: Path
    old: str | None
    """None for what is new."""
    new: str | None
    """None for what is gone."""
    meaning: str
    """From when on it counts, and what becomes of what is there."""

    @property
    def key(self) -> str:
        """The key as errors have it: ``plans.pro.price``."""
        return ".".join(self.path)

    @property
    def kind(self) -> Literal["added", "removed", "changed"]:
        """What happened to it."""
        if self.old is None:
            return "added"
        return "removed" if self.new is None else "changed"

    def __str__(self) -> str:
        if self.old is None:
            return f"{self.key} is new"
        return f"{self.key} is gone" if self.new is None else f"{self.key} was {self.old}, is {self.new}"


def compare(old: Catalog, new: Catalog) -> list[Change]:
    """Every key by which two catalogs differ, but for name and version; an entry that only one has is one change."""
    found: list[Change] = []
    for field in msgspec.structs.fields(Catalog):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if before == after:
            continue
        section = field.encode_name
        if isinstance(before, dict):
            for name in {**before, **after}:
                found += _compared((section, name), before.get(name), after.get(name))
        else:
            found += _compared((section,), before, after)
    return [change for change in found if change.path not in (("catalog", "name"), ("catalog", "version"))]


def _compared(path: Path, old: Any, new: Any) -> Iterator[Change]:
    if old is None or new is None:
        yield _change(path, None if old is None else summary(old), None if new is None else summary(new))
        return
    before, after = dict(leaves(values(old), path)), dict(leaves(values(new), path))
    for each in {**before, **after}:
        if before.get(each) != after.get(each):
            yield _change(each, before.get(each), after.get(each))


def _change(path: Path, old: str | None, new: str | None) -> Change:
    return Change(path, old, new, _meaning(path, old, new))


def values(value: Any) -> Any:
    """A catalog, a section or a value of one as JSON has it: amounts are decimal strings of credits; None is left out.

    Read as TOML, it is the same catalog again.
    """
    match value:
        case msgspec.Struct():
            fields = msgspec.structs.fields(value)
            return {
                field.encode_name: values(said) for field in fields if (said := getattr(value, field.name)) is not None
            }
        case dict():
            return {name: values(each) for name, each in value.items()}
        case list():
            return [values(each) for each in value]
        case Micro():
            return format_amount(value)
        case datetime():
            return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return value


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """What :func:`values` gave, value by value in words, each with its key; none of what is empty."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from leaves(each, (*path, name))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, each in enumerate(value):
            yield from leaves(each, (*path[:-1], f"{path[-1]}[{number}]"))
    elif value != []:
        yield path, _words(value)


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def summary(entry: Any) -> str:
    """An entry in one line: what it says beyond the defaults."""
    said = values(entry)
    if isinstance(entry, msgspec.Struct):
        for field in msgspec.structs.fields(entry):
            if field.default is not msgspec.NODEFAULT and said.get(field.encode_name) == values(field.default):
                said.pop(field.encode_name, None)
    return ", ".join(f"{'.'.join(path)} = {text}" if path else text for path, text in leaves(said))


def _meaning(path: Path, old: str | None, new: str | None) -> str:
    section, field = path[0], path[-1]
    is_gone = len(path) == 2 and new is None
    match section:
        case "lead" if field == "per_user":
            return "of leads that sign up from then on; whom a user was while there was no limit is not counted"
        case "features" if is_gone:
            return "whatever names it is refused as unknown_feature; holds of it that are open are captured by amount"
        case "plans" if is_gone:
            return "who has it goes on by the terms as they were; nobody can begin it any more"
        case "plans" if len(path) == 3 and field in TERMS:
            return "who has it keeps the old terms until the next renewal"
        case "packs" | "offers" if is_gone:
            return "payments of its prices wait, or are parked"
        case "packs" | "plans" | "offers" if field == "prices" and old is not None:
            return "payments by a price that nothing has any more wait, or are parked"
    return MEANINGS.get(section, "")
