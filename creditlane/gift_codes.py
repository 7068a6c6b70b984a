"""The texts of gift codes: hard to guess, easy to read out and to type in."""

from __future__ import annotations

import secrets

from creditlane.contract import normal_code

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
"""Crockford's base32: no I, L, O or U, so that none is taken for another."""

LENGTH = 16
"""Characters of a code: 80 bits. Whoever tries a thousand a second finds one of a million codes in 38 million years."""

GROUP = 4


def new_code() -> str:
    """A code that nobody can guess, as the ledger keeps it; see :func:`shown` for people."""
    return "".join(secrets.choice(ALPHABET) for _ in range(LENGTH))


def shown(code: str) -> str:
    """A code for people, in groups of four.

    >>> shown("0123456789ABCDEF")
    '0123-4567-89AB-CDEF'
    """
    return "-".join(code[start : start + GROUP] for start in range(0, len(code), GROUP))


__all__ = ["ALPHABET", "LENGTH", "new_code", "normal_code", "shown"]
