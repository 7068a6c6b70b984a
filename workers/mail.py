"""Notices by e-mail, over SMTP.

A server on another machine is spoken to over TLS or not at all. ``Message-ID`` is the same however often a notice is
sent, so that a repeat can be recognised.
"""

from __future__ import annotations

import smtplib
import ssl
from email.errors import HeaderParseError
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import localtime, parseaddr
from urllib.parse import unquote, urlsplit

from models.rules.catalog import Catalog
from models.settings import Settings, is_loopback
from workers.channels import (
    ChannelAwayError,
    DeliveryError,
    NoAddressError,
    Told,
    UndeliverableError,
    cause,
    time_limit,
)
from workers.wording import word

CHANNEL = "email"

SECONDS = 10.0
"""How long the server may take for one answer."""

WHOLE_SECONDS = 30.0
"""How long for all of them."""

PORTS = {"smtp": 587, "smtps": 465}

PERMANENT = 500
"""Replies from here on are for ever (RFC 5321)."""


def send(told: Told, catalog: Catalog, config: Settings) -> None:
    """Send a notice; return when the server has taken it.

    :raises NoAddressError: when the account has no e-mail address.
    :raises ChannelAwayError: when there is no server, or it lets nobody in.
    :raises UndeliverableError: when it refuses this message for good, or the address is none.
    :raises DeliveryError: when it refuses it for now.
    """
    if not told.email:
        raise NoAddressError("the account has no e-mail address")
    if config.smtp_url is None:
        raise ChannelAwayError("CREDITLANE_SMTP_URL is not set")
    message = message_of(told, catalog, config.mail_from)
    try:
        with connect(config.smtp_url.get_secret_value()) as server, time_limit(server, WHOLE_SECONDS):
            server.send_message(message)
    except smtplib.SMTPRecipientsRefused as error:
        raise _refused(next(iter(error.recipients.values()))[0]) from error
    except smtplib.SMTPNotSupportedError as error:
        raise UndeliverableError("the server takes no such address") from error
    except (smtplib.SMTPAuthenticationError, smtplib.SMTPConnectError, smtplib.SMTPHeloError) as error:
        raise ChannelAwayError(f"the mail server lets nobody in: reply {error.smtp_code}") from error
    except smtplib.SMTPResponseException as error:
        raise _refused(error.smtp_code) from error
    except (OSError, smtplib.SMTPException) as error:
        raise ChannelAwayError(f"the mail server is away ({cause(error)})") from error


def _refused(code: int) -> DeliveryError:
    kind = UndeliverableError if code >= PERMANENT else DeliveryError
    return kind(f"the mail server refused it: reply {code}")


def connect(url: str) -> smtplib.SMTP:
    """Connect to a mail server, over TLS unless it is on loopback, and log in where the URL has a user.

    :param url: as in :attr:`models.settings.Settings.smtp_url`.
    :raises smtplib.SMTPException: when it has no TLS, or lets nobody in.
    :raises OSError: when it is away, or its certificate is not as it should be.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or PORTS[parts.scheme]
    if parts.scheme == "smtps":
        server: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=SECONDS, context=ssl.create_default_context())
    else:
        server = smtplib.SMTP(host, port, timeout=SECONDS)
    try:
        if parts.scheme == "smtp" and not is_loopback(host):
            try:
                server.starttls(context=ssl.create_default_context())
            except smtplib.SMTPNotSupportedError as error:
                raise smtplib.SMTPServerDisconnected("it has no TLS, and nothing is sent without") from error
        if parts.username:
            server.login(unquote(parts.username), unquote(parts.password or ""))
    except BaseException:
        server.close()
        raise
    return server


def message_of(told: Told, catalog: Catalog, sender: str) -> EmailMessage:
    """A notice as an e-mail with a text and an HTML part, in the account's language.

    :param sender: such as ``Acme <credits@acme.example>``.
    :raises UndeliverableError: when the account's address is none.
    """
    name, address = parseaddr(sender)
    try:
        # One address, and nothing of headers in it.
        recipient = Address(addr_spec=told.email or "")
    except (ValueError, IndexError, HeaderParseError) as error:
        raise UndeliverableError("the account's e-mail address is none") from error
    if not recipient.username or not recipient.domain:
        raise UndeliverableError("the account's e-mail address is none")
    worded = word(told, catalog, name)
    message = EmailMessage(policy=SMTP)
    message["Subject"] = worded.subject
    message["From"] = Address(name, addr_spec=address)
    message["To"] = recipient
    message["Date"] = localtime()
    message["Message-ID"] = f"<{told.id}@{address.rpartition('@')[2]}>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(worded.text)
    message.add_alternative(worded.html, subtype="html")
    message["Content-Language"] = worded.language  # of the whole: set before, it would be the first part's
    return message
