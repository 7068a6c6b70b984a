"""Every setting of the server, from environment variables named ``CREDITLANE_…``.

Secrets (the passwords in the URLs) come from the environment only, and no default of theirs works.
"""

from __future__ import annotations

from functools import cache

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from creditlane.contract import MAX_BATCH
from creditlane.events import matching
from creditlane.lanes import LANES


class Settings(BaseSettings):
    """The server's settings; each can be given as ``CREDITLANE_<NAME>``."""

    model_config = SettingsConfigDict(env_prefix="CREDITLANE_", extra="ignore", hide_input_in_errors=True)

    broker_url: SecretStr
    """Where messages come from: ``redis://:password@host:port/0``."""

    database_url: SecretStr
    """The ledger, in the process's own role: ``postgresql://user:password@host:port/name``. A direct connection or
    session pooling: a lane is owned by a session's advisory lock."""

    owner_url: SecretStr | None = None
    """The same database for who owns its tables and migrates it; ``database_url`` unless given."""

    worker_password: SecretStr | None = None
    """Given to the role ``creditlane_worker`` by the migration, which makes it if need be; left alone unless given."""

    reader_password: SecretStr | None = None
    """The same for the role ``creditlane_reader``."""

    result_url: SecretStr | None = None
    """Where results for waiting senders go; the broker unless given."""

    lanes: int = Field(LANES, ge=1, le=4096)
    """How many lanes; the same for all producers and workers of a deployment."""

    catalog: str = "packs"
    """A shipped catalog's name, or the path of a TOML file."""

    batch_messages: int = Field(500, ge=1, le=5000)
    """The most messages in one transaction."""

    batch_operations: int = Field(1000, ge=MAX_BATCH, le=20_000)
    """The most operations in one transaction; at least one whole ``credits.batch``."""

    balance_seconds: float = Field(2.0, gt=0, le=60)
    """How often a worker looks whether the lanes are shared evenly, and takes what is free."""

    result_expires_seconds: int = Field(24 * 3600, ge=60)
    """How long results for waiting senders are kept in the result backend; in ``operations`` for ever."""

    audit_processes: int = Field(2, ge=1, le=64)
    """How many processes share the daily audit, where there is enough of it."""

    audit_catalogs: str = ""
    """Catalogs of the past for the daily replay, besides ``catalog``: names or paths, with commas between them."""

    seal_wait_seconds: float = Field(120.0, gt=0, le=3600)
    """How long a seal waits for transactions that may still write what belongs to it, before it is tried again."""

    max_retry_seconds: float = Field(30.0, gt=0)
    """The longest pause between two attempts at a database that is away."""

    metrics_port: int = Field(0, ge=0, le=65535)
    """Where a lane worker serves its metrics to Prometheus; 0: nowhere. Each worker of a host needs its own."""

    metrics_address: str = "127.0.0.1"
    """The address it serves them on. They hold no secrets and ask for no password: keep them in your network."""

    events: str = ""
    """Which events are published to the topic exchange ``credits.events``: a comma list of types or patterns, such as
    ``balance.changed,credits.*``; ``*`` for all, none unless given. Each costs a row in the outbox, its publication
    and its deletion, so ask for those that somebody listens to. The types are in ``creditlane/events.py``."""

    @field_validator("events")
    @classmethod
    def _are_types_of_events(cls, patterns: str) -> str:
        """Refuse a mistyped pattern at the start, rather than never to publish what it was meant for."""
        matching(patterns)
        return patterns

    @field_validator("database_url", "owner_url")
    @classmethod
    def _is_a_connection_url(cls, url: SecretStr | None) -> SecretStr | None:
        """Refuse a mistyped URL here, in words of ours: the driver's would quote it, with its password."""
        if url is None:
            return None
        try:
            conninfo_to_dict(url.get_secret_value())
        except ProgrammingError:
            raise ValueError("not a connection URL; write postgresql://user:password@host:port/name") from None
        return url


@cache
def settings() -> Settings:
    """The settings of this process, read once.

    :raises pydantic.ValidationError: naming the variable that is missing or wrong.
    """
    return Settings()
