"""Bringing a database to the present schema: ``python -m models.migrate``."""

from __future__ import annotations

import sys
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

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


def main() -> None:
    """Migrate the database of ``CREDITLANE_DATABASE_URL``."""
    from models.settings import settings

    upgrade(settings().database_url.get_secret_value())
    sys.stdout.write("the database has the present schema\n")


if __name__ == "__main__":
    main()
