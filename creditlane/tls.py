"""TLS to the brokers: whom to trust and who we are, always checked.

The libraries disagree by default: one checks the server's certificate, one its certificate and not its name, one
nothing at all. So every connection is given these options, and whatever would weaken them is refused.
"""

from __future__ import annotations

import ssl
from os import PathLike
from typing import Any
from urllib.parse import parse_qsl, urlsplit

TLSOptions = dict[str, Any] | None
"""What the libraries take for a connection with TLS; nothing for one without."""

SECURE = {"rediss": "redis", "amqps": "amqp"}
"""The schemes with TLS, and those that are the same without."""


def tls_options(
    url: str,
    *,
    ca: str | PathLike[str] | None = None,
    certificate: str | PathLike[str] | None = None,
    key: str | PathLike[str] | None = None,
) -> TLSOptions:
    """The options of a connection to a broker, for its URL.

    For ``rediss://`` they are what both ``redis.Redis.from_url(url, **options)`` and kombu's
    ``Connection(url, ssl=options)`` take, for ``amqps://`` what the latter takes. The server has to have a
    certificate for the URL's host that ``ca`` vouches for.

    :param ca: the certificates of whom to trust, a PEM file; those of the system unless given.
    :param certificate: our own, a PEM file, for a server that asks for one.
    :param key: its key, unless it is in the same file.
    :returns: the options; ``None`` for a URL without TLS.
    :raises ValueError: for files that a connection without TLS would ignore, and for parameters in the URL.
    """
    parts = urlsplit(url)
    files = {"ca": ca, "certificate": certificate, "key": key}
    given = {name: str(path) for name, path in files.items() if path is not None}
    secure = parts.scheme in SECURE
    if given and not secure:
        raise ValueError("files for TLS are given and the URL is one without: write rediss:// or amqps://")
    if any(name.startswith("ssl") for name, _ in parse_qsl(parts.query, keep_blank_values=True)):
        raise ValueError("TLS is not set in the URL, where each library reads it in its own way: give the files")
    if "key" in given and "certificate" not in given:
        raise ValueError("a key is given and no certificate")
    if not secure:
        return None
    if SECURE[parts.scheme] == "redis":
        names = {"ca": "ssl_ca_certs", "certificate": "ssl_certfile", "key": "ssl_keyfile"}
        options: dict[str, Any] = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}
    else:
        names = {"ca": "ca_certs", "certificate": "certfile", "key": "keyfile"}
        # Without a name to compare, the library would take any certificate that is valid for anybody.
        options = {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": parts.hostname or "localhost"}
    return options | {names[name]: path for name, path in given.items()}
