"""Flower never without a password where others can reach it.

It shows whose credits are used for what, and its buttons stop workers. So whoever starts it on an address that is not
this machine's own has to give it ``FLOWER_BASIC_AUTH`` (``user:password``) or another of its ways to log in.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import click
from celery.signals import import_modules

REFUSAL = (
    "Flower would listen on {where} without a password, where others can reach it; set FLOWER_BASIC_AUTH to "
    "user:password in the environment, or have it listen here only with --address=127.0.0.1"
)


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address; an empty one stands for all that it has."""
    if address == "localhost":
        return True
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False


def is_guarded(basic_auth: list[str]) -> bool:
    """Whether every one of ``user:password`` has a password: a single one without would be enough to come in."""
    return bool(basic_auth) and all(entry.partition(":")[2] for entry in basic_auth)


def check_flower(options: Any) -> None:
    """Refuse to go on when Flower's options leave it open.

    :raises click.UsageError: saying what to do.
    """
    open_to_others = not (options.unix_socket or is_loopback(options.address))
    if open_to_others and not (options.auth or is_guarded(options.basic_auth)):
        raise click.UsageError(REFUSAL.format(where=options.address or "every address"))


def install(app: Any) -> None:
    """Have an app's Flower check itself, however it is started: before it listens it imports the app's tasks."""

    def check(**_: Any) -> None:
        context = click.get_current_context(silent=True)
        if context is not None and context.info_name == "flower":
            from tornado.options import options

            try:
                check_flower(options)
            except click.UsageError as error:
                # Whatever else a signal's receiver raises is logged with its trace.
                error.show()
                raise SystemExit(error.exit_code) from None

    import_modules.connect(check, sender=app, weak=False)
