"""How a notice reads: its sentences in the account's language, its numbers and dates as people there write them.

``templates/en.toml`` and ``fr.toml`` have the sentences, each a small Jinja2 template; ``templates/notice.html`` and
``notice.txt`` what is around them. A language that is not there is English.
"""

from __future__ import annotations

import textwrap
import tomllib
from datetime import UTC, datetime, tzinfo
from decimal import Decimal, InvalidOperation
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
from babel import Locale, UnknownLocaleError
from babel.dates import format_date, format_time
from babel.numbers import format_currency, format_decimal
from jinja2 import Environment, FileSystemLoader, Template, pass_context
from jinja2.runtime import Context

from models.rules.catalog import Catalog
from workers.channels import Told

TEMPLATES = Path(__file__).parent / "templates"

LANGUAGES = ("en", "fr")
"""The first one stands in for those that are not there."""

OTHER = "other"
"""The sentences for a kind that has none of its own: one that came later than this worker."""

LINE_CHARACTERS = 72


class Worded(NamedTuple):
    """A notice in words."""

    language: str
    subject: str
    text: str
    html: str


class Style:
    """How numbers, money and instants are written for one account; whatever it asked for, it gets something.

    :param locale: such as ``fr``, ``fr-CA`` or ``fr_CA``; nothing, or one that does not exist, is English.
    :param timezone: an IANA name; nothing, or one that does not exist, is UTC.
    """

    def __init__(self, locale: str | None, timezone: str | None) -> None:
        self.locale = _locale(locale)
        self.language: str = self.locale.language
        self.zone = _zone(timezone)

    def number(self, value: object) -> str:
        """A number as people write it."""
        found = _decimal(value)
        return "" if found is None else format_decimal(found, "#,##0.######", locale=self.locale)

    def credits(self, value: object) -> str:
        """An amount of credits, with its unit."""
        found = _decimal(value)
        if found is None:
            return ""
        unit = sentences(self.language)["units"][self.locale.plural_form(abs(found))]
        return f"{self.number(found)}\N{NO-BREAK SPACE}{unit}"

    def money(self, value: object) -> str:
        """Money, given as ``"4.99 EUR"``."""
        amount, _, currency = str(value).partition(" ")
        found = _decimal(amount)
        return str(value) if found is None or not currency else format_currency(found, currency, locale=self.locale)

    def day(self, value: object) -> str:
        """The day of an instant, where the account is."""
        found = _instant(value)
        return "" if found is None else format_date(found.astimezone(self.zone), "long", locale=self.locale)

    def moment(self, value: object) -> str:
        """An instant to the minute, where the account is."""
        found = _instant(value)
        if found is None:
            return ""
        local = found.astimezone(self.zone)
        time = format_time(local, "short", tzinfo=self.zone, locale=self.locale)
        joined: str = sentences(self.language)["words"]["moment"]
        return joined.format(day=self.day(local), time=time, zone=local.tzname())


def word(told: Told, catalog: Catalog, brand: str = "") -> Worded:
    """Put a notice into words.

    :param catalog: for the titles of plans.
    :param brand: whose e-mail it is; the catalog's name unless given.
    """
    speech = Speech(told, catalog)
    about = {"brand": brand or catalog.catalog.name, "account": told.account}
    return Worded(speech.language, speech.subject, speech.page("notice.txt", about), speech.page("notice.html", about))


def subject(told: Told, catalog: Catalog) -> str:
    """A notice in one line."""
    return Speech(told, catalog).subject


class Speech:
    """The sentences of one notice.

    :param catalog: for the titles of plans.
    """

    def __init__(self, told: Told, catalog: Catalog) -> None:
        style = Style(told.locale, told.timezone)
        self.language = style.language
        self._all = sentences(style.language)
        self._own = self._all["kinds"].get(told.kind) or self._all["kinds"][OTHER]
        self._advised = told.advice is not None
        self._values = {
            **told.details,
            "kind": told.kind,
            "at": told.at,
            "account": told.account,
            "style": style,
            "plans": {name: plan.title or name for name, plan in catalog.plans.items()},
            "advice": told.advice,
        }

    @property
    def subject(self) -> str:
        """One line, whatever stands in what it tells of."""
        return _line(self._say(self._own["subject"]))

    def page(self, template: str, about: dict[str, str]) -> str:
        """All of it, in a template of its kind of text."""
        html = template.endswith(".html")
        shown = {
            **about,
            "language": self.language,
            "subject": self.subject,
            "figure": self._say(self._own.get("figure", "")),
            "caption": self._say(self._own.get("caption", "")),
            "paragraphs": self._paragraphs(self._own["body"], html),
            "advice": self._paragraphs(self._all["advice"]["body"], html) if self._advised else [],
            "words": self._all["words"],
        }
        return _environment(html).get_template(template).render(shown)

    def _paragraphs(self, body: list[str], html: bool) -> list[str]:
        return [said for each in body if (said := self._say(each, html))]

    def _say(self, sentence: str, html: bool = False) -> str:
        """A sentence with what it tells of in it; where it is HTML, that is escaped."""
        said: str = _sentence(sentence, html).render(self._values).strip()
        return said


@cache
def sentences(language: str) -> dict[str, Any]:
    """All sentences of a language."""
    return tomllib.loads((TEMPLATES / f"{language}.toml").read_text(encoding="utf-8"))


def _line(text: str) -> str:
    """Text with nothing but single plain spaces in it."""
    return " ".join(text.split())


def _filled(text: str, indent: str = "") -> str:
    """A paragraph in lines of an e-mail.

    :param indent: before each line but the first.
    """
    return textwrap.fill(
        text, LINE_CHARACTERS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


@cache
def _environment(html: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=html,  # noqa: S701 - a text is no HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in ("number", "credits", "money", "day", "moment"):
        environment.filters[name] = _filter(name)
    environment.filters["filled"] = _filled
    environment.filters["line"] = _line
    return environment


def _filter(name: str) -> Any:
    @pass_context
    def write(context: Context, value: object) -> str:
        written: str = getattr(context["style"], name)(value)
        return written

    return write


@cache
def _sentence(sentence: str, html: bool) -> Template:
    return _environment(html).from_string(sentence)


def _locale(name: str | None) -> Locale:
    try:
        found = Locale.parse((name or "").replace("-", "_"))
    except (UnknownLocaleError, ValueError, TypeError):
        language = (name or "").replace("-", "_").partition("_")[0].lower()
        found = Locale(language) if language in LANGUAGES else Locale(LANGUAGES[0])
    return found if found.language in LANGUAGES else Locale(LANGUAGES[0])


def _zone(name: str | None) -> tzinfo:
    try:
        return ZoneInfo(name) if name else UTC
    except (KeyError, ValueError, OSError):
        return UTC


def _decimal(value: object) -> Decimal | None:
    try:
        found = Decimal(str(value))
    except InvalidOperation:
        return None
    return found if found.is_finite() else None


def _instant(value: object) -> datetime | None:
    if isinstance(value, datetime):
        return value
    try:
        return msgspec.convert(value, datetime, strict=False)
    except msgspec.ValidationError:
        return None
