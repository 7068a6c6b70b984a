"""The catalog in force: its file is looked at while the process works, and what is good of it is taken up.

A process has one of these. At most once a second it looks whether the file has changed; a file that has stood still
for as long is read and checked whole. One that is wrong, or that says something else under a label that was used
before, is refused: the last good one stays in force until the file is mended, and the log says so once.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from psycopg import Connection

from models.catalog import CatalogError, CatalogText, catalog_path, read_catalog
from models.catalog_texts import check_kept, keep, kept_catalog, latest_version
from models.rules.catalog import Catalog
from models.settings import settings

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often the file is looked at, at the most, and how long it has to stand still before it is read: a file that is
being written may make sense half way."""

Stamp = tuple[int, int, int] | None
"""What tells that a file has changed: time, size and place; None for one that is not there."""


class InForce:
    """The catalog of a process, kept up to date; for several threads.

    :param name: of a shipped catalog, or the path of a file.
    :param applies: whether operations are applied under it. Then its text is kept in the ledger before it is used, and
        the connections that are handed over must be of a role that writes the ledger.
    :raises CatalogError: when the file cannot be used: a process does not begin without a catalog.
    """

    def __init__(self, name: str, *, applies: bool = False) -> None:
        self._name = name
        self._path = catalog_path(name)
        self._applies = applies
        self._stamp = stamp_of(self._path)
        self._read = read_catalog(name)
        self._changed: Stamp = None
        self._is_known = False
        self._look_at = 0.0
        self._behind = 0
        self._lock = threading.Lock()
        self.refused: str | None = None
        """Why the file as it stands is not in force; None when it is."""

    @property
    def last(self) -> Catalog:
        """The catalog that was in force at the last look."""
        return self._read.catalog

    def catalog(self, connection: Connection[Any]) -> Catalog:
        """The catalog in force now.

        :param connection: to the ledger, in autocommit mode; asked when the file is new.
        :raises CatalogError: when the file says something else under its label than was used, and that cannot be read.
        :raises psycopg.Error: when the ledger cannot be asked; the next call tries again.
        """
        with self._lock:
            if not self._is_known:
                self._begin(connection)
            elif time.monotonic() >= self._look_at:
                self._look(connection)
                self._look_at = time.monotonic() + LOOK_SECONDS
            return self._read.catalog

    def forget(self) -> None:
        """Have the ledger asked again: it may be another one, or one that was brought back from a backup."""
        with self._lock:
            self._is_known = False

    def compare(self, connection: Connection[Any]) -> bool:
        """Look whether a later version was in force elsewhere, and say so in the log once for each.

        :returns: whether it was: then the file of this process is behind, or was set back.
        """
        about = self.last.catalog
        latest = latest_version(connection, about.name)
        if latest > max(about.version, self._behind):
            logger.warning(
                "the catalog is behind: %s is in force here and version %d was elsewhere; bring %s up to date",
                self.last.label, latest, self._path,
            )  # fmt: skip
        self._behind = latest if latest > about.version else 0
        return self._behind > 0

    def _begin(self, connection: Connection[Any]) -> None:
        """Ask the ledger about what is in force. What it knows by that label holds, if the file says otherwise."""
        try:
            self._approve(connection, self._read)
        except CatalogError as error:
            known = kept_catalog(connection, self._read.catalog.label)
            assert known is not None
            self._read = known
            self._refuse(error)
        self._is_known = True

    def _look(self, connection: Connection[Any]) -> None:
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        if stamp != self._changed:
            self._changed = stamp
            return
        try:
            read = read_catalog(self._name)
            self._approve(connection, read)
        except CatalogError as error:
            self._refuse(error)
        else:
            before, self._read = self.last, read
            if self.refused is not None or before != self.last:
                logger.warning("the catalog %s is in force, after %s", self.last.label, before.label)
            self.refused = None
        self._stamp = stamp

    def _approve(self, connection: Connection[Any], read: CatalogText) -> None:
        if self._applies:
            keep(connection, read, str(self._path))
        else:
            check_kept(connection, read.catalog, str(self._path))

    def _refuse(self, error: CatalogError) -> None:
        self.refused = str(error)
        logger.error("the catalog's file is refused, %s stays in force: %s", self.last.label, error)


def stamp_of(path: Path) -> Stamp:
    """What tells whether a file has changed."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def catalog_in_force(connection: Connection[Any]) -> Catalog:
    """The catalog in force in this process, for whoever applies no operations.

    :param connection: to the ledger, in autocommit mode; it is only read.
    :raises CatalogError: when there never was a good one.
    :raises psycopg.Error: when the ledger is away, and the file is new.
    """
    return _of(settings().catalog).catalog(connection)


@cache
def _of(name: str) -> InForce:
    return InForce(name)
