"""The roles that processes log in as: members of a group that the migrations make, with its rights and no more."""

from __future__ import annotations

from typing import Any

from psycopg import Connection, sql

WORKERS, READERS = "creditlane_workers", "creditlane_readers"
"""The groups: who writes the ledger by its rules, and who only looks."""

WORKER, READER = "creditlane_worker", "creditlane_reader"
"""The roles that log in, one of each group; a deployment may have others."""


def allow_login(connection: Connection[Any], name: str, password: str, group: str) -> None:
    """Let a role log in as a member of a group; one that is there gets the password.

    :param connection: in autocommit mode, of a role that may create roles and has made the group, or may grant it.
    :param password: leaves this process only as the verifier that the server stores.
    :raises ValueError: for an empty password.
    :raises psycopg.Error: when the server refuses.
    """
    if not password:
        raise ValueError(f"the role {name} needs a password")
    verifier = connection.pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256").decode()
    role = sql.Identifier(name)
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtext('creditlane roles'))")
        found = connection.execute("SELECT FROM pg_roles WHERE rolname = %s", (name,)).fetchone()
        connection.execute(
            sql.SQL("{} ROLE {} LOGIN PASSWORD {}").format(
                sql.SQL("CREATE" if found is None else "ALTER"), role, sql.Literal(verifier)
            )
        )
        member = connection.execute("SELECT pg_has_role(%s, %s, 'MEMBER')", (name, group)).fetchone()
        if member != (True,):
            connection.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), role))
