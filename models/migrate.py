"""Bringing a database to the present schema: ``python -m models.migrate``."""

from __future__ import annotations

import sys
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from models.roles import READER, READERS, WORKER, WORKERS, allow_login

MIGRATION_LOCK = 0x6372_6564
"""The advisory lock that two migrating processes take turns by."""


def sqlalchemy_url(database_url: str) -> str:
    """The same database for SQLAlchemy: ``postgresql+psycopg://…``."""
    scheme, separator, rest = database_url.partition("://")
    if scheme not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise ValueError("the database URL must start with postgresql://")
    return f"postgresql+psycopg{separator}{rest}"


def alembic_config(connection: Connection) -> Config:
    """Alembic's settings, without a file of its own."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def upgrade(database_url: str) -> None:
    """Apply every migration that the database has not seen; two processes at once take turns.

    :param database_url: ``postgresql://…`` of a role that owns the schema.
    """
    engine = create_engine(sqlalchemy_url(database_url), poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
        connection.commit()
        try:
            command.upgrade(alembic_config(connection), "head")
            connection.commit()
        finally:
            connection.rollback()
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": MIGRATION_LOCK})
            connection.commit()
    engine.dispose()


def make_logins(database_url: str, passwords: dict[str, str]) -> None:
    """Let the worker's and the reader's role log in, each as a member of its group.

    :param database_url: of a role that may create roles.
    :param passwords: by role: :data:`models.roles.WORKER`, :data:`models.roles.READER`, or one of them.
    """
    groups = {WORKER: WORKERS, READER: READERS}
    with psycopg.connect(database_url, autocommit=True) as connection:
        for role, password in passwords.items():
            allow_login(connection, role, password, groups[role])


def main() -> None:
    """Migrate the database of ``CREDITLANE_OWNER_URL``, or of ``CREDITLANE_DATABASE_URL``; see the settings."""
    from models.settings import settings

    config = settings()
    url = (config.owner_url or config.database_url).get_secret_value()
    upgrade(url)
    given = {WORKER: config.worker_password, READER: config.reader_password}
    passwords = {role: password.get_secret_value() for role, password in given.items() if password is not None}
    make_logins(url, passwords)
    made = f"; {' and '.join(passwords)} may log in" if passwords else ""
    sys.stdout.write(f"the database has the present schema{made}\n")


if __name__ == "__main__":
    main()
