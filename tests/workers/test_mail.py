"""E-mails that a real server takes: both languages, both parts, and nothing in them but what belongs there."""

from __future__ import annotations

import ssl
import tomllib
from datetime import UTC, datetime
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models.catalog import load_catalog
from models.rules.catalog import NOTICE_KINDS
from models.settings import Settings
from scripts.embedded import free_port
from tests.receivers import MailServer
from tests.security.tls import Authority
from workers.channels import ChannelAwayError, DeliveryError, NoAddressError, Told, UndeliverableError
from workers.mail import send
from workers.wording import LANGUAGES, TEMPLATES, Style, word

CATALOG = load_catalog("rollover")
AT = datetime(2026, 11, 21, 23, 30, tzinfo=UTC)
KINDS = ("low_balance", "expiring", *NOTICE_KINDS)
DETAILS: dict[str, Any] = {
    "amount": "1234.5", "available": "1234.5", "reference": "2000", "expires_at": "2026-12-03T09:30:00Z",
    "plan": "starter", "plan_next": "pro", "period_end": "2026-12-21T16:00:00Z", "allotted": "100",
    "rolled_over": "70", "expired": "3", "purchase": "p-1", "charge": "c-1", "sender": "bob", "member": "zoe",
    "credits": "700", "price": "99.00 EUR", "order": "order.1", "next_attempt_at": "2026-11-24T10:00:00Z",
    "achievement": "explorer", "title": "Explorer",
}  # fmt: skip


def told(kind: str = "gift_received", /, **given: Any) -> Told:
    """A notice for alice."""
    about = {"account": "alice", "key": f"{kind}:1", "email": "alice@example.org", "locale": "en", "timezone": "UTC"}
    return Told(kind=kind, at=AT, **{"details": DETAILS, **about, **given})


def config(server: MailServer, url: str = "smtp://127.0.0.1:{port}", sender: str = "Acme <c@acme.example>") -> Settings:
    """The settings of a worker."""
    return Settings(
        broker_url="redis://127.0.0.1/0", database_url="postgresql://127.0.0.1/x",
        smtp_url=url.format(port=server.port), mail_from=sender,
    )  # fmt: skip


def parts(mail: EmailMessage) -> tuple[str, str]:
    """The text and the HTML of an e-mail."""
    assert mail.get_content_type() == "multipart/alternative"
    text, html = mail.iter_parts()
    assert isinstance(text, EmailMessage)
    assert isinstance(html, EmailMessage)
    assert (text.get_content_type(), html.get_content_type()) == ("text/plain", "text/html")
    return text.get_content(), html.get_content()


def test_an_e_mail_in_english(mail_server: MailServer) -> None:
    send(told("expiring", locale="en-US", timezone="America/New_York"), CATALOG, config(mail_server))
    (mail,) = mail_server.mails
    assert mail_server.recipients == ["alice@example.org"]
    assert (mail["From"], mail["To"]) == ("Acme <c@acme.example>", "alice@example.org")
    assert mail["Subject"] == "1,234.5 credits will expire on December 3, 2026"
    assert mail["Content-Language"] == "en"
    assert mail["Auto-Submitted"] == "auto-generated"
    assert mail["Message-ID"].endswith("@acme.example>")
    text, html = parts(mail)
    assert "Use them before December 3, 2026 at 4:30" in text
    assert "EST" in text
    assert '<html lang="en">' in html
    assert "1,234.5\xa0credits" in html


def test_an_e_mail_in_french(mail_server: MailServer) -> None:
    send(told("plan_cancelled", locale="fr_FR", timezone="Europe/Paris"), CATALOG, config(mail_server))
    (mail,) = mail_server.mails
    assert mail["Subject"] == "Votre formule Starter est résiliée"
    text, html = parts(mail)
    assert "prendra fin le 21 décembre 2026 à 17:00 CET" in " ".join(text.split())
    assert "D’ici là, rien ne change." in html
    assert '<html lang="fr">' in html


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", [*KINDS, "of a later version"])
def test_every_kind_can_be_said_with_all_that_is_known_of_it_and_with_nothing(kind: str, language: str) -> None:
    for details in (DETAILS, {}):
        worded = word(told(kind, locale=language, details=details), CATALOG, "Acme")
        assert worded.subject
        assert worded.subject == " ".join(worded.subject.split())
        for page in (worded.subject, worded.text, worded.html):
            assert not any(mark in page for mark in ("{{", "{%", "None", "Undefined"))


def test_a_refunded_purchase_and_a_charge_that_was_taken_back_are_told_apart() -> None:
    bought = word(told("refunded", details={"purchase": "stripe:cs_1", "amount": "25"}), CATALOG)
    assert bought.subject == "Your purchase has been refunded"
    assert "−25 credits" in bought.text.replace("\xa0", " ")
    nothing = word(told("refunded", details={"purchase": "stripe:cs_1", "amount": "0"}), CATALOG)
    assert "0 credits" not in nothing.text.replace("\xa0", " ")
    charged = word(told("refunded", details={"charge": "c-1", "amount": "25"}), CATALOG)
    assert charged.subject.replace("\xa0", " ") == "25 credits given back"
    assert "+25 credits" in charged.html.replace("\xa0", " ")


@pytest.mark.parametrize(
    ("details", "said"),
    [
        ({"plan": "starter", "price": "9.99 USD"}, "The payment of $9.99 for your plan Starter did not go through."),
        ({"price": "9.99 USD"}, "A payment of yours of $9.99 did not go through."),
        ({"action_required": True}, "A payment of yours waits for your bank's confirmation."),
    ],
)
def test_a_payment_that_failed_is_told_with_what_is_known(details: dict[str, Any], said: str) -> None:
    assert said in " ".join(word(told("payment_failed", details=details), CATALOG).text.split())


def test_both_languages_say_the_same() -> None:
    english, french = (tomllib.loads((TEMPLATES / f"{name}.toml").read_text()) for name in LANGUAGES)
    assert set(english["kinds"]) == set(french["kinds"]) == {*KINDS, "other"}
    for kind, sentences in english["kinds"].items():
        assert set(sentences) == set(french["kinds"][kind])
        assert len(sentences["body"]) == len(french["kinds"][kind]["body"])
    assert english["words"].keys() == french["words"].keys()


def test_what_others_wrote_is_text_and_nothing_else(mail_server: MailServer) -> None:
    script = "<script>alert('x')</script>{{ 7*7 }}"
    given = {"amount": script, "sender": f"bob{script}", "message": f"“{script}” & more"}
    send(told(details=given, account=script), CATALOG, config(mail_server))
    (mail,) = mail_server.mails
    text, html = parts(mail)
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;{{ 7*7 }}" in html
    assert script in " ".join(text.split())
    assert "49" not in html + text


@pytest.mark.parametrize("kind", KINDS)
def test_no_header_comes_of_what_others_wrote(kind: str, mail_server: MailServer) -> None:
    evil = "x\r\nBcc: eve@example.org\r\n\r\n<b>"
    details = dict.fromkeys(DETAILS, evil)
    send(told(kind, details=details, account=evil, key=evil), CATALOG, config(mail_server))
    (mail,) = mail_server.mails
    assert mail["Bcc"] is None
    assert mail_server.recipients == ["alice@example.org"]
    assert set(mail.keys()) == {
        "Subject", "From", "To", "Date", "Message-ID", "Auto-Submitted", "Content-Language", "MIME-Version",
        "Content-Type", "X-Peer", "X-MailFrom", "X-RcptTo",
    } & set(mail.keys())  # fmt: skip
    assert "\n" not in mail["Subject"]


@pytest.mark.parametrize(
    "address",
    [
        "alice",
        "@",
        "a@",
        "@b",
        "a@b, eve@example.org",
        "a@b\r\nBcc: eve@example.org",
        "<a@b>",
        "a b@c",
        "x" * 250,
        "a@@b",
    ],
)
def test_what_is_no_address_gets_nothing(address: str, mail_server: MailServer) -> None:
    with pytest.raises(UndeliverableError):
        send(told(email=address), CATALOG, config(mail_server))
    assert mail_server.mails == []


def test_an_account_without_an_address(mail_server: MailServer) -> None:
    with pytest.raises(NoAddressError):
        send(told(email=None), CATALOG, config(mail_server))


@pytest.mark.parametrize(
    ("locale", "timezone", "credits", "moment"),
    [
        (None, None, "1,234.5\xa0credits", "November 21, 2026 at 11:30\u202fPM UTC"),
        ("en-GB", "Europe/London", "1,234.5\xa0credits", "21 November 2026 at 23:30 GMT"),
        ("fr", "Europe/Paris", "1\u202f234,5\xa0crédits", "22 novembre 2026 à 00:30 CET"),
        ("fr_CA", "America/Montreal", "1\xa0234,5\xa0crédits", "21 novembre 2026 à 18 h 30 EST"),
        ("de-DE", "Europe/Berlin", "1,234.5\xa0credits", "November 22, 2026 at 12:30\u202fAM CET"),
        ("xx", "Nowhere/At_all", "1,234.5\xa0credits", "November 21, 2026 at 11:30\u202fPM UTC"),
        ("----", "../../etc/passwd", "1,234.5\xa0credits", "November 21, 2026 at 11:30\u202fPM UTC"),
        ("x" * 35, "Europe", "1,234.5\xa0credits", "November 21, 2026 at 11:30\u202fPM UTC"),
    ],
)  # fmt: skip
def test_whatever_locale_an_account_has(locale: str | None, timezone: str | None, credits: str, moment: str) -> None:
    style = Style(locale, timezone)
    assert style.credits("1234.5") == credits
    assert style.moment(AT.isoformat()) == moment


@pytest.mark.parametrize(
    ("language", "amount", "said"),
    [
        ("en", "1", "1\xa0credit"), ("en", "0.5", "0.5\xa0credits"), ("en", 0, "0\xa0credits"),
        ("fr", "1", "1\xa0crédit"), ("fr", "0.5", "0,5\xa0crédit"), ("fr", 0, "0\xa0crédit"),
        ("fr", "2", "2\xa0crédits"), ("fr", "1000000", "1\u202f000\u202f000\xa0de crédits"),
        ("en", "no number", ""), ("en", "NaN", ""), ("en", None, ""),
    ],
)  # fmt: skip
def test_how_many_credits(language: str, amount: object, said: str) -> None:
    assert Style(language, None).credits(amount) == said


def test_money_has_its_currencys_decimals() -> None:
    assert Style("en", None).money("4.99 EUR") == "€4.99"
    assert Style("fr", None).money("4.99 EUR") == "4,99\xa0€"
    assert Style("en", None).money("500 JPY") == "¥500"


def test_replies_of_the_server(mail_server: MailServer) -> None:
    settings = config(mail_server)
    for reply, error in (("550 no such user", UndeliverableError), ("450 busy", DeliveryError)):
        mail_server.reply = reply
        with pytest.raises(error) as refused:
            send(told(), CATALOG, settings)
        assert type(refused.value) is error
        assert reply[:3] in str(refused.value)
    mail_server.reply = "250 OK"
    for reply, error in (("554 spam", UndeliverableError), ("451 later", DeliveryError)):
        mail_server.after_data = reply
        with pytest.raises(error) as refused:
            send(told(), CATALOG, settings)
        assert type(refused.value) is error
    assert mail_server.mails == []


def test_nobody_is_there(mail_server: MailServer) -> None:
    with pytest.raises(ChannelAwayError, match="ConnectionRefusedError"):
        send(told(), CATALOG, config(mail_server, f"smtp://127.0.0.1:{free_port()}"))


def test_a_server_elsewhere_gets_nothing_without_tls(mail_server: MailServer) -> None:
    # The same server under a name that does not say it is this machine.
    with pytest.raises(ChannelAwayError):
        send(told(), CATALOG, config(mail_server, "smtp://user:secret@127.1:{port}"))
    assert mail_server.mails == []


def test_a_server_elsewhere_is_spoken_to_after_starttls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path, "ours")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.sign("mail", "DNS:127.1"))
    server = MailServer(starttls=context)
    try:
        elsewhere = config(server, "smtp://127.1:{port}")
        with pytest.raises(ChannelAwayError, match="SSLCertVerificationError"):
            send(told(), CATALOG, elsewhere)
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.own.file))
        send(told(), CATALOG, elsewhere)
        assert len(server.mails) == 1
    finally:
        server.close()


@pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS")
def test_with_tls_and_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path, "ours")
    certificate = authority.sign("mail", "IP:127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.file, certificate.key)
    server = MailServer(context, ("user", "p@ss/word"))
    try:
        known = config(server, "smtps://user:p%40ss%2Fword@127.0.0.1:{port}")
        with pytest.raises(ChannelAwayError, match="SSLCertVerificationError") as failed:
            send(told(), CATALOG, known)
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.own.file))
        send(told(), CATALOG, known)
        assert len(server.mails) == 1
        with pytest.raises(ChannelAwayError, match="reply 535") as refused:
            send(told(), CATALOG, config(server, "smtps://user:wr0ngword@127.0.0.1:{port}"))
        for error in (failed, refused):
            assert "word" not in str(error.value)
            assert "p@ss" not in repr(known)
    finally:
        server.close()


@pytest.mark.parametrize(
    ("url", "sender"),
    [
        ("http://host", "a@b.example"), ("smtp://", "a@b.example"), ("smtp://us er:pa55word@host", "a@b.example"),
        ("smtp://user:pa55word@host:99999", "a@b.example"), ("smtp://host", ""), ("smtp://host", "nobody"),
        ("smtp://host", "a@b.example\r\nBcc: c@d.example"), ("smtp://host", "A <a@b>, B <c@d>\n"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(url: str, sender: str, mail_server: MailServer) -> None:
    with pytest.raises(ValidationError) as refused:
        config(mail_server, url, sender)
    assert "pa55word" not in str(refused.value)
