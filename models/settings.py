"""Every setting of the server, from environment variables named ``CREDITLANE_…``.

Secrets (the passwords in the URLs) come from the environment only, and no default of theirs works.
"""

from __future__ import annotations

import re
from base64 import b64decode
from binascii import Error as Base64Error
from email.errors import HeaderParseError
from email.headerregistry import Address
from email.utils import parseaddr
from functools import cache
from ipaddress import ip_address
from typing import Any, Self
from urllib.parse import urlsplit

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import Field, FilePath, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from creditlane.contract import MAX_BATCH
from creditlane.events import matching
from creditlane.lanes import LANES
from creditlane.tls import tls_options
from models.catalog import DEFAULT_CATALOG

SHORTEST_SECRET = 16
"""Characters of a secret that a payment provider signs with."""

API_KEY = re.compile(r"[sr]k_(?:live|test)_[A-Za-z0-9_]{8,250}", re.ASCII)

BROKERS = ("redis", "rediss", "amqp", "amqps", "pyamqp")
"""The schemes of a broker's URL; the second and the fourth with TLS."""


class Settings(BaseSettings):
    """The server's settings; each can be given as ``CREDITLANE_<NAME>``."""

    model_config = SettingsConfigDict(env_prefix="CREDITLANE_", extra="ignore", hide_input_in_errors=True)

    broker_url: SecretStr
    """Where messages come from: ``redis://user:password@host:port/0`` or ``amqp://user:password@host:port/vhost``; with
    TLS ``rediss://`` or ``amqps://``."""

    database_url: SecretStr
    """The ledger, in the process's own role: ``postgresql://user:password@host:port/name``. A direct connection or
    session pooling: a lane is owned by a session's advisory lock. With TLS add
    ``?sslmode=verify-full&sslrootcert=/path/ca.pem`` (and ``sslcert``, ``sslkey`` where the server asks for them)."""

    owner_url: SecretStr | None = None
    """The same database for who owns its tables and migrates it; ``database_url`` unless given."""

    worker_password: SecretStr | None = None
    """Given to the role ``creditlane_worker`` by the migration, which makes it if need be; left alone unless given."""

    reader_password: SecretStr | None = None
    """The same for the role ``creditlane_reader``."""

    result_url: SecretStr | None = None
    """A Redis for the results for waiting senders; the broker unless given."""

    broker_ca: FilePath | None = None
    """Whose certificates broker and result backend have to have, a PEM file: for ``rediss://`` and ``amqps://``. The
    system's authorities unless given. There is no way to leave the check out."""

    broker_certificate: FilePath | None = None
    """Our own certificate, a PEM file, for a broker that asks for one."""

    broker_key: FilePath | None = None
    """The key of that certificate, unless it is in the same file."""

    lanes: int = Field(LANES, ge=1, le=4096)
    """How many lanes; the same for all producers and workers of a deployment."""

    catalog: str = DEFAULT_CATALOG
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
    """Catalogs of before the ledger kept them, for the daily replay: names or paths, with commas between them."""

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

    smtp_url: SecretStr | None = None
    """Where e-mail goes: ``smtp://user:password@host:587`` (STARTTLS is required, but on loopback) or
    ``smtps://user:password@host:465``. The server's certificate and name are checked, by the system's authorities or
    by those of ``SSL_CERT_FILE``."""

    mail_from: str = ""
    """The sender of e-mails, such as ``Acme <credits@acme.example>``; the name stands in them too."""

    webhook_url: SecretStr | None = None
    """Where notices are posted to: ``https://…``, or ``http://`` on loopback."""

    webhook_secret: SecretStr | None = None
    """What they are signed with: ``whsec_`` and 24 to 64 bytes in Base64. Several, with commas, while a new one takes
    the place of an old one: each notice is signed with all."""

    payments_livemode: bool = True
    """Whether payments are of live money. A ledger knows one mode: what Stripe sends of the other is parked, and those
    who do not say are taken to be of this one."""

    stripe_webhook_secrets: SecretStr | None = None
    """What Stripe signs its webhooks with: ``whsec_…``. Several, with commas, while a new one takes the place of an old
    one. Without them the relay knows no Stripe."""

    stripe_api_key: SecretStr | None = None
    """The key for Stripe's API: ``sk_live_…`` or ``sk_test_…``, or a restricted one (``rk_…``), of the ledger's mode.
    Without it nothing can be sold, and what moves credits is not fetched again."""

    stripe_api_base: str = ""
    """Where Stripe's API is, to try things out: ``https://host``, or ``http://`` on loopback. Stripe's own unless
    given."""

    paypal_webhook_id: str = ""
    """The webhook's id at PayPal, which its signatures are of; several with commas. It goes with
    ``paypal_authorities``, and without both the relay knows no PayPal."""

    paypal_authorities: FilePath | None = None
    """The certificates that lead to PayPal's, a PEM file: the root, and those between."""

    creem_secrets: SecretStr | None = None
    """What Creem signs its webhooks with; several with commas. Without them the relay knows no Creem."""

    sepay_secrets: SecretStr | None = None
    """The same for SePay."""

    relay_address: str = "127.0.0.1"
    """The address on which the relay takes webhooks. What it speaks is HTTP: put what ends TLS before it."""

    relay_port: int = Field(8787, ge=0, le=65535)
    """Its port; 0 for any free one, which it prints."""

    relay_connections: int = Field(200, ge=2, le=10_000)
    """The most clients that it has at a time; others are told to come again."""

    relay_database_connections: int = Field(4, ge=1, le=64)
    """Webhooks that it verifies and stores at a time, each over its own connection to the database."""

    @field_validator(
        "broker_ca", "broker_certificate", "broker_key", "smtp_url", "webhook_url", "webhook_secret",
        "stripe_webhook_secrets", "stripe_api_key", "paypal_authorities", "creem_secrets", "sepay_secrets",
        mode="before",
    )  # fmt: skip
    @classmethod
    def _empty_is_none(cls, path: Any) -> Any:
        """What is passed on unset, as by docker-compose.yml, is not set."""
        return path or None

    @field_validator("broker_url", "result_url")
    @classmethod
    def _is_a_broker_url(cls, url: SecretStr | None) -> SecretStr | None:
        """Refuse a mistyped URL here, in words of ours: a library's would quote it, with its password."""
        if url is None:
            return None
        try:
            parts = urlsplit(url.get_secret_value())
            good = parts.scheme in BROKERS and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise ValueError(
                "not a broker URL; write redis://user:password@host:port/0 or amqp://user:password@host:port/vhost, "
                "with anything but letters and digits in the password percent-encoded"
            )
        return url

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
            given = conninfo_to_dict(url.get_secret_value())
        except ProgrammingError:
            raise ValueError("not a connection URL; write postgresql://user:password@host:port/name") from None
        mode = given.get("sslmode")
        if mode in ("allow", "prefer") or (mode == "require" and "sslrootcert" not in given):
            raise ValueError(
                f"sslmode={mode} checks no certificate; write sslmode=verify-full&sslrootcert=/path/ca.pem"
            )
        return url

    @field_validator("smtp_url")
    @classmethod
    def _is_a_mail_server(cls, url: SecretStr | None) -> SecretStr | None:
        """Refuse a mistyped URL without quoting it."""
        if url is not None and not _is_url(url, "smtp", "smtps"):
            raise ValueError("not a mail server's URL; write smtp://user:password@host:587 or smtps://…:465")
        return url

    @field_validator("mail_from")
    @classmethod
    def _is_an_address(cls, sender: str) -> str:
        """Refuse a sender that no e-mail could have."""
        if sender:
            name, address = parseaddr(sender)
            try:
                Address(name, addr_spec=address)
            except (ValueError, IndexError, HeaderParseError):
                address = ""
            if "@" not in address or not sender.isprintable():
                raise ValueError("not a sender; write Acme <credits@acme.example>")
        return sender

    @field_validator("webhook_url")
    @classmethod
    def _is_a_safe_url(cls, url: SecretStr | None) -> SecretStr | None:
        """Refuse to send notices through a network that others can read."""
        if url is None:
            return None
        if not _is_url(url, "http", "https") or urlsplit(url.get_secret_value()).username is not None:
            raise ValueError("not a webhook's URL; write https://host/path, without a user or a password")
        parts = urlsplit(url.get_secret_value())
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            raise ValueError("a webhook's URL begins with https://, unless it is on loopback")
        return url

    @field_validator("webhook_secret")
    @classmethod
    def _are_secrets(cls, secrets: SecretStr | None) -> SecretStr | None:
        """Refuse a mistyped secret, or one that can be guessed."""
        if secrets is not None:
            for secret in secrets.get_secret_value().split(","):
                try:
                    size = len(b64decode(secret.strip().removeprefix("whsec_"), validate=True))
                except (Base64Error, ValueError):
                    size = 0
                if not secret.strip().startswith("whsec_") or not 24 <= size <= 64:
                    raise ValueError("a secret is whsec_ and 24 to 64 random bytes in Base64")
        return secrets

    @field_validator("stripe_webhook_secrets", "creem_secrets", "sepay_secrets")
    @classmethod
    def _are_shared_secrets(cls, secrets: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        """Refuse a mistyped secret, or one that can be guessed: whoever has it can make credits."""
        prefix = "whsec_" if info.field_name == "stripe_webhook_secrets" else ""
        for secret in listed(secrets):
            if not (secret.startswith(prefix) and _is_word(secret) and len(secret) >= SHORTEST_SECRET + len(prefix)):
                begin = f"{prefix} and " if prefix else ""
                raise ValueError(
                    f"a secret is {begin}at least {SHORTEST_SECRET} printable ASCII characters without blanks; "
                    "several have one comma between them"
                )
        return secrets

    @field_validator("stripe_api_key")
    @classmethod
    def _is_an_api_key(cls, key: SecretStr | None) -> SecretStr | None:
        """Refuse what is no secret key, such as the publishable one."""
        if key is not None and API_KEY.fullmatch(key.get_secret_value()) is None:
            raise ValueError("not a secret key of Stripe; it begins with sk_live_, sk_test_, rk_live_ or rk_test_")
        return key

    @field_validator("stripe_api_base")
    @classmethod
    def _is_a_base(cls, base: str) -> str:
        """Refuse to send the API key through a network that others can read."""
        if base:
            if not _is_url(SecretStr(base), "http", "https") or "@" in base or "?" in base or "#" in base:
                raise ValueError("not the address of an API; write https://host")
            parts = urlsplit(base)
            if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
                raise ValueError("the address of an API begins with https://, unless it is on loopback")
        return base.rstrip("/")

    @field_validator("paypal_webhook_id")
    @classmethod
    def _are_webhook_ids(cls, ids: str) -> str:
        if ids and not all(_is_word(id) for id in ids.split(",")):
            raise ValueError(
                "not the id of a webhook, such as 8PT597110X687430LKGECATA; several have one comma between"
            )
        return ids

    @field_validator("relay_address")
    @classmethod
    def _is_an_ip_address(cls, address: str) -> str:
        try:
            ip_address(address)
        except ValueError:
            raise ValueError("not an address to listen on; write 127.0.0.1, or 0.0.0.0 for all") from None
        return address

    @model_validator(mode="after")
    def _payments_make_sense(self) -> Self:
        if (self.paypal_webhook_id == "") != (self.paypal_authorities is None):
            raise ValueError("paypal_webhook_id and paypal_authorities go together")
        if self.stripe_api_key is not None:
            is_live = "_live_" in self.stripe_api_key.get_secret_value()[:8]
            if is_live != self.payments_livemode:
                mode = "test" if self.payments_livemode else "live"
                raise ValueError(f"stripe_api_key is of {mode} mode, and payments_livemode says otherwise")
        return self

    @model_validator(mode="after")
    def _notices_can_go_out(self) -> Self:
        if self.smtp_url is not None and not self.mail_from:
            raise ValueError("smtp_url needs mail_from, the sender of e-mails")
        if (self.webhook_url is None) != (self.webhook_secret is None):
            raise ValueError("webhook_url and webhook_secret go together")
        return self

    @model_validator(mode="after")
    def _tls_makes_sense(self) -> Self:
        for url in (self.broker_url, self.result_url):
            if url is not None:
                self.tls(url)
        return self

    def tls(self, url: SecretStr) -> dict[str, Any] | None:
        """The TLS options of a connection to the broker or the result backend; see :func:`creditlane.tls.tls_options`.

        :raises ValueError: when the files and the URL do not fit together.
        """
        return tls_options(
            url.get_secret_value(), ca=self.broker_ca, certificate=self.broker_certificate, key=self.broker_key
        )


def listed(secrets: SecretStr | None) -> tuple[str, ...]:
    """The secrets of a setting that may have several, with commas between them."""
    return () if secrets is None else tuple(secrets.get_secret_value().split(","))


def _is_word(text: str) -> bool:
    return text != "" and text.isascii() and text.isprintable() and " " not in text


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its very name: what is sent to it passes no network."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _is_url(url: SecretStr, *schemes: str) -> bool:
    text = url.get_secret_value()
    try:
        parts = urlsplit(text)
        good = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
        return good and _is_word(text)
    except ValueError:
        return False


@cache
def settings() -> Settings:
    """The settings of this process, read once.

    :raises pydantic.ValidationError: naming the variable that is missing or wrong.
    """
    return Settings()
