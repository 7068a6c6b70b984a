"""The texts of catalogs that operations were applied under, by label: what a replay goes by (catalogs: reload).

An operation keeps only the label of its catalog, so what stands under a label is never changed: a text is kept before
the first operation is applied under it, and other content needs another version. What counts is what a text says:
comments, order and spelling may change.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from psycopg import Connection

from models.catalog import CatalogError, CatalogText, Problem, parse_catalog, refusal
from models.catalog_changes import compare
from models.rules.catalog import Catalog

KEEP = "INSERT INTO catalogs (label, text, first_used_at) VALUES (%s, %s, ledger_now()) ON CONFLICT DO NOTHING"
KEPT = "SELECT text FROM catalogs WHERE label = %s"
ALL_KEPT = "SELECT label, text, first_used_at FROM catalogs ORDER BY first_used_at, label"
LABELS = "SELECT label FROM catalogs"


class KeptText(NamedTuple):
    """A catalog that was ever in force."""

    label: str
    text: str
    first_used_at: datetime


def keep(connection: Connection[Any], read: CatalogText, file: str) -> None:
    """Keep the text of a catalog, before operations are applied under its label.

    :param connection: in autocommit mode, of a role that writes the ledger.
    :raises CatalogError: when the label was used with other content.
    """
    connection.execute(KEEP, (read.catalog.label, read.text))
    check_kept(connection, read.catalog, file)


def check_kept(connection: Connection[Any], catalog: Catalog, file: str) -> None:
    """Check that a catalog says what was used under its label, if anything was.

    :raises CatalogError: when it was other content.
    """
    label = catalog.label
    row = connection.execute(KEPT, (label,)).fetchone()
    if row is None:
        return
    try:
        changes = compare(parse_catalog(row[0], label), catalog)
    except CatalogError as error:
        raise _used_otherwise(file, label, f"which cannot be read any more: {error}") from None
    if changes:
        more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
        raise _used_otherwise(file, label, f"{changes[0]}{more}")


def _used_otherwise(file: str, label: str, how: str) -> CatalogError:
    return refusal(file, [Problem("catalog.version", f"{label} was used with other content ({how}); raise version")])


def kept_catalog(connection: Connection[Any], label: str) -> CatalogText | None:
    """What was used under a label, or None when nothing was.

    :raises CatalogError: when its text cannot be read any more.
    """
    row = connection.execute(KEPT, (label,)).fetchone()
    return None if row is None else CatalogText(parse_catalog(row[0], label), row[0])


def kept_texts(connection: Connection[Any]) -> list[KeptText]:
    """Every text that was ever in force, the earliest first."""
    return [KeptText(*row) for row in connection.execute(ALL_KEPT)]


def kept_catalogs(connection: Connection[Any]) -> dict[str, Catalog]:
    """By label, every catalog that was ever in force; those are left out whose text cannot be read any more."""
    found = {}
    for label, text, _ in kept_texts(connection):
        try:
            found[label] = parse_catalog(text, label)
        except CatalogError:
            continue  # who replays is told of the label that is missing
    return found


def latest_version(connection: Connection[Any], name: str) -> int:
    """The highest version of a catalog that was ever in force; 0 for none."""
    labels = (row[0].rpartition("-") for row in connection.execute(LABELS))
    return max((int(version) for known, _, version in labels if known == name), default=0)
