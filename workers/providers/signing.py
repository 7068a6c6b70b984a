"""Signatures that are an HMAC-SHA256 by a shared secret."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence

from workers.providers.base import VerificationError

_HEX = re.compile(r"[0-9a-fA-F]{64}\Z", re.ASCII)


def check_secrets(secrets: Sequence[str], of: str) -> tuple[bytes, ...]:
    """The secrets of an endpoint, as keys.

    :param of: whose endpoint it is, for the error.
    :raises ValueError: when there is none, or a blank one.
    """
    if not secrets or not all(secret.strip() for secret in secrets):
        raise ValueError(f"an endpoint of {of} needs its secret")
    return tuple(secret.encode() for secret in secrets)


def check_hmac(message: bytes, signature: str, keys: Sequence[bytes]) -> None:
    """Check a signature by each key.

    :param signature: in hexadecimal.
    :raises VerificationError: when it is by none of them.
    """
    if _HEX.match(signature) is None:
        raise VerificationError("bad_signature", "the signature is not one")
    given = bytes.fromhex(signature)
    if not any(hmac.compare_digest(hmac.digest(key, message, hashlib.sha256), given) for key in keys):
        raise VerificationError("bad_signature", "no signature of the body by a secret of this endpoint")
