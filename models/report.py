"""What an audit finds: rows that are not as they should be, by name."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_FAULTS = 1000
"""Faults that a report names; further ones are only counted."""


@dataclass(frozen=True)
class Fault:
    """One row that is not as it should be."""

    account: str
    """Whose row it is; empty for one that belongs to no account, such as a seal."""
    table: str
    key: str
    """Which row, such as ``seq 7``."""
    what: str
    """What is wrong with it, in a sentence."""


@dataclass
class Report:
    """What an audit looked at and found."""

    accounts: int = 0
    operations: int = 0
    entries: int = 0
    replayed: int = 0
    """Operations that were fed to the rules again."""
    not_replayed: dict[str, int] = field(default_factory=dict)
    """Operations that could not be, by the catalog that was not at hand."""
    seals: int = 0
    """Seals whose roots were computed again."""
    rows_read: int = 0
    """Rows of all tables that were read for it."""
    fault_count: int = 0
    faults: list[Fault] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether everything that was looked at is as it should be."""
        return not self.fault_count

    @property
    def is_whole(self) -> bool:
        """Whether everything was looked at that was asked for."""
        return not self.not_replayed

    def add(self, account: str, table: str, key: str, what: str) -> None:
        """Note a fault."""
        self.fault_count += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(Fault(account, table, key, what))

    def missing_catalog(self, label: str, operations: int) -> None:
        """Note operations that could not be replayed because their catalog is not at hand."""
        self.not_replayed[label] = self.not_replayed.get(label, 0) + operations

    def take(self, other: Report) -> None:
        """Add what another process found."""
        self.accounts += other.accounts
        self.operations += other.operations
        self.entries += other.entries
        self.replayed += other.replayed
        self.seals += other.seals
        self.rows_read += other.rows_read
        self.fault_count += other.fault_count
        self.faults += other.faults[: MAX_FAULTS - len(self.faults)]
        for label, count in other.not_replayed.items():
            self.missing_catalog(label, count)
