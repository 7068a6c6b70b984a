"""The adapters that the settings ask for, and where PayPal's certificates come from."""

from __future__ import annotations

import http.client
import threading
import time
from collections import OrderedDict
from urllib.parse import urlsplit

from models.settings import Settings, listed
from workers.channels import cause, time_limit
from workers.providers.base import Adapter, VerificationError
from workers.providers.creem import Creem
from workers.providers.paypal import PayPal
from workers.providers.sepay import SePay
from workers.providers.stripe import Stripe

CONNECT_SECONDS = 3.0
WHOLE_SECONDS = 8.0
"""How long a certificate may take in all."""

CERTIFICATE_BYTES = 64 * 1024
"""The longest chain of certificates that is read."""

CERTIFICATES_KEPT = 16
KEPT_SECONDS = 24 * 3600
FETCHES = 2
"""Certificates fetched at a time: their addresses are in the headers of whoever asks."""


def adapters(config: Settings) -> dict[str, Adapter]:
    """An adapter of each provider that has its secrets, by its name.

    :raises ValueError: when the file of PayPal's authorities has no certificates.
    """
    livemode = config.payments_livemode
    found: list[Adapter] = []
    if config.stripe_webhook_secrets is not None:
        found.append(Stripe(listed(config.stripe_webhook_secrets), livemode=livemode))
    if config.paypal_authorities is not None:
        authorities = config.paypal_authorities.read_bytes()
        found.append(PayPal(config.paypal_webhook_id.split(","), Certificates(), authorities, livemode=livemode))
    if config.creem_secrets is not None:
        found.append(Creem(listed(config.creem_secrets), livemode=livemode))
    if config.sepay_secrets is not None:
        found.append(SePay(listed(config.sepay_secrets), livemode=livemode))
    return {adapter.name: adapter for adapter in found}


class CertificatesAwayError(Exception):
    """A certificate could not be had just now: the delivery is to be repeated."""


class Certificates:
    """Gets certificates over HTTPS, and keeps them for :data:`KEPT_SECONDS`. Redirects are not followed.

    Safe to share among threads. Whoever asks for too many at a time is told to come again.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self._room = threading.Semaphore(FETCHES)

    def __call__(self, address: str) -> bytes:
        """The certificate at an address, with those between it and its authority.

        :param address: which the adapter has checked.
        :returns: PEM.
        :raises VerificationError: when there is none at that address.
        :raises CertificatesAwayError: when it could not be had.
        """
        with self._lock:
            kept = self._kept.get(address)
            if kept is not None and kept[0] > time.monotonic():
                self._kept.move_to_end(address)
                return kept[1]
        if not self._room.acquire(blocking=False):
            raise CertificatesAwayError(f"{FETCHES} certificates are being fetched")
        try:
            pem = _fetch(address)
        finally:
            self._room.release()
        with self._lock:
            self._kept[address] = (time.monotonic() + KEPT_SECONDS, pem)
            self._kept.move_to_end(address)
            while len(self._kept) > CERTIFICATES_KEPT:
                self._kept.popitem(last=False)
        return pem


def _fetch(address: str) -> bytes:
    parts = urlsplit(address)
    connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=CONNECT_SECONDS)
    try:
        with time_limit(connection, WHOLE_SECONDS):
            connection.request("GET", parts.path, headers={"User-Agent": "creditlane"})
            response = connection.getresponse()
            pem = response.read(CERTIFICATE_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise CertificatesAwayError(f"no certificate could be had ({cause(error)})") from error
    finally:
        connection.close()
    if response.status == 429 or response.status >= 500:
        raise CertificatesAwayError(f"no certificate could be had (HTTP {response.status})")
    if response.status != 200 or b"-----BEGIN CERTIFICATE-----" not in pem:
        raise VerificationError("bad_certificate", "there is no certificate at its address")
    return pem
