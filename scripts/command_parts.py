"""What the commands of ``creditlane`` have in common: where the ledger is, options, and how a command ends."""

from __future__ import annotations

import getpass
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import msgspec
import psycopg
import redis
import typer
from kombu.exceptions import KombuError
from psycopg import Connection
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from creditlane.client import CreditClient
from creditlane.codes import Code
from creditlane.contract import ContractError, Result
from creditlane.errors import BrokerUnavailableError, CreditlaneError, NoAnswerError, QuarantinedError
from creditlane.lanes import LANES
from creditlane.tls import TLSOptions, tls_options
from models.catalog import DEFAULT_CATALOG, CatalogError, load_catalog
from models.database import connect
from models.reading import (
    MAX_PAGE,
)
from models.rules.catalog import Catalog
from scripts.embedded import process_exists
from scripts.lane_state import MAX_LANES
from scripts.requeue import RequeueError
from scripts.showing import (
    console,
    plain,
    refusal,
    result_lines,
    said,
)

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".creditlane" / "stack.json"
"""Where a running embedded stack says how to reach it."""

WAIT_SECONDS = 10.0
"""How long a command waits for the ledger's answer unless told otherwise."""

LINE_SECONDS = 10.0
"""How often long work says how far it is where there is no terminal."""

OK, FAULTS, USAGE, REFUSED, AWAY, NO_ANSWER, BROKEN, INTERRUPTED = 0, 1, 2, 3, 4, 5, 70, 130
"""The exit codes."""

EXIT_CODES = """[bold]Exit codes[/]
0  applied, or done
1  the audit found faults, or the message was quarantined
2  the command makes no sense as it was given, or nothing tells where the ledger is
3  refused by the ledger; the code is printed
4  the broker, the database or the payment provider is away
5  no answer in time; send it again with its id"""

WHERE = (
    "[bold]Where the ledger is[/]\n"
    "CREDITLANE_BROKER_URL, CREDITLANE_DATABASE_URL and CREDITLANE_LANES tell. When neither URL is set, it is the "
    "embedded stack of this checkout, if it runs (scripts/run)."
)


# --- Where the ledger is -----------------------------------------------------------------------------


class ConfigurationError(Exception):
    """Nothing tells where the ledger is, or what tells it makes no sense."""


@dataclass(frozen=True)
class Deployment:
    """Where the ledger is; the addresses hold passwords."""

    lanes: int
    _broker_url: str | None = field(repr=False)
    _database_url: str | None = field(repr=False)
    result_url: str | None = field(repr=False, default=None)
    tls_files: dict[str, str] = field(default_factory=dict)
    """The files of a broker with TLS: ``ca``, ``certificate``, ``key``."""
    catalog_name: str = DEFAULT_CATALOG

    @property
    def catalog(self) -> Catalog:
        """The catalog in force.

        :raises CatalogError: when it cannot be used.
        """
        return load_catalog(self.catalog_name)

    @property
    def broker_url(self) -> str:
        """Where messages go."""
        return self._given(self._broker_url, "CREDITLANE_BROKER_URL", "redis://:password@host:6379/0")

    @property
    def database_url(self) -> str:
        """The ledger's database."""
        return self._given(
            self._database_url, "CREDITLANE_DATABASE_URL", "postgresql://user:password@host:5432/creditlane"
        )

    @property
    def tls(self) -> TLSOptions:
        """The TLS options of a connection to the broker.

        :raises ConfigurationError: when files and address do not fit together.
        """
        try:
            return tls_options(self.broker_url, **self.tls_files)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None

    @staticmethod
    def _given(value: str | None, variable: str, example: str) -> str:
        if value is None:
            raise ConfigurationError(
                f"nothing tells where the ledger is: set {variable} (such as {example}), "
                "or start the embedded stack with scripts/run"
            )
        return value


def deployment() -> Deployment:
    """Find the ledger: the environment first, else the embedded stack of this checkout if it runs.

    :raises ConfigurationError: for an address or a number that makes no sense.
    """
    broker = os.environ.get("CREDITLANE_BROKER_URL") or None
    database = os.environ.get("CREDITLANE_DATABASE_URL") or None
    results = os.environ.get("CREDITLANE_RESULT_URL") or None
    catalog = os.environ.get("CREDITLANE_CATALOG") or None
    lanes: object = os.environ.get("CREDITLANE_LANES") or None
    # Never one of each: a message of one ledger is not to be looked for in another.
    if broker is None and database is None:
        state = _embedded_stack()
        broker, database = state.get("broker_url"), state.get("database_url")
        lanes = lanes or state.get("lanes")
        catalog = catalog or state.get("catalog")
        results = None
    _check_url("CREDITLANE_BROKER_URL", broker, ("redis", "rediss", "amqp", "amqps", "pyamqp", "memory"))
    _check_url("CREDITLANE_DATABASE_URL", database, ("postgresql", "postgres"))
    _check_url("CREDITLANE_RESULT_URL", results, ("redis", "rediss"))
    try:
        count = LANES if lanes is None else int(str(lanes))
    except ValueError:
        count = 0
    if not 1 <= count <= MAX_LANES:
        raise ConfigurationError(f"CREDITLANE_LANES is a number from 1 to {MAX_LANES}, not {plain(str(lanes))!r}")
    names = ("ca", "certificate", "key")
    files = {name: path for name in names if (path := os.environ.get(f"CREDITLANE_BROKER_{name.upper()}"))}
    return Deployment(count, broker, database, results, files, catalog or DEFAULT_CATALOG)


def _embedded_stack() -> dict[str, Any]:
    try:
        state = json.loads(STATE.read_text(encoding="utf-8"))
        alive = isinstance(state, dict) and process_exists(int(state.get("pids", {}).get("postgres", os.getpid())))
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return state if alive else {}  # after a crash the file is left over


def _check_url(variable: str, url: str | None, schemes: tuple[str, ...]) -> None:
    if url is None:
        return
    try:
        parts = urlsplit(url)
        _ = parts.port
        good = parts.scheme in schemes
    except ValueError:
        good = False
    if not good:
        raise ConfigurationError(f"{variable} is no URL that begins with {schemes[0]}://; it is not shown here")


def masked(text: str) -> str:
    """A text without the passwords of the addresses that this process knows."""
    try:
        known = deployment()
    except ConfigurationError:
        return text
    for url in (known._broker_url, known._database_url, known.result_url):
        password = urlsplit(url).password if url else None
        if password:
            for secret in {password, unquote(password)}:
                text = text.replace(secret, "***")
    return text


@contextmanager
def ledger(application: str = "creditlane command line", *, read_only: bool = True) -> Iterator[Connection[Any]]:
    """A connection to the ledger's database; one that cannot write unless it has to."""
    with connect(deployment().database_url, application, read_only=read_only) as connection:
        yield connection


# --- How it ends -------------------------------------------------------------------------------------


def fail(sentence: str, code: int) -> NoReturn:
    """Say one sentence on stderr and end."""
    console(stderr=True).print(f"[red]error:[/] {said(masked(sentence))}", soft_wrap=True)
    raise typer.Exit(code)


class Commands(TyperGroup):
    """A group whose commands end in a sentence and a meaningful exit code, never in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except (ContractError, RequeueError, ConfigurationError, CatalogError) as error:
            fail(str(error), USAGE)
        except QuarantinedError as error:
            fail(f"the message was quarantined: {error}", FAULTS)
        except NoAnswerError as error:
            fail(str(error), NO_ANSWER)
        except BrokerUnavailableError as error:
            fail(str(error), AWAY)
        except psycopg.errors.UndefinedTable:
            fail("the database has no ledger in it; make one with: python -m models.migrate", AWAY)
        except psycopg.Error as error:
            fail(_database_sentence(error), AWAY)
        except BrokenPipeError:
            raise
        except (CreditlaneError, redis.RedisError, KombuError, OSError) as error:
            fail(f"the broker is away ({type(error).__name__}: {_first_line(error)})", AWAY)
        except Exception as error:
            # Typer's own endings look like exceptions as well.
            if type(error).__module__.startswith("typer") or os.environ.get("CREDITLANE_TRACEBACK"):
                raise
            fail(
                f"something went wrong inside ({type(error).__name__}: {_first_line(error)}); "
                "CREDITLANE_TRACEBACK=1 shows where",
                BROKEN,
            )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")


def _database_sentence(error: psycopg.Error) -> str:
    if isinstance(error, psycopg.OperationalError):
        return f"the database is away ({_first_line(error)})"
    return f"the database refused ({type(error).__name__} {error.sqlstate}: {_first_line(error)})"


def show_json(value: Any) -> None:
    """Write one JSON document on stdout, on a line of its own."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def examples(*lines: str, codes: bool = False) -> str:
    """The end of a command's help: examples, one a line."""
    shown = "\n".join(f"  {line}" for line in lines)
    text = f"[bold]Examples[/]\n{shown}"
    return f"{text}\n\n{EXIT_CODES}\n\n{WHERE}" if codes else text


class CountProgress:
    """How far long work is: a bar with the rate in a terminal, elsewhere a line now and then; on stderr.

    :param what: what is done, such as ``auditing``.
    :param unit: what is counted, such as ``operations``.
    """

    def __init__(self, what: str, unit: str, quiet: bool) -> None:
        self._what, self._unit = what, unit
        self._errors = console(stderr=True)
        self._lines = not quiet and not self._errors.is_terminal
        self._began = self._told = time.monotonic()
        self._bar = Progress(
            TextColumn(what), BarColumn(), TextColumn("{task.fields[figures]}"), TimeElapsedColumn(),
            console=self._errors, transient=True, disable=quiet or self._lines,
        )  # fmt: skip
        self._task = self._bar.add_task(what, total=None, figures="")

    def __enter__(self) -> CountProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Tell how many are done, and how many there are."""
        now = time.monotonic()
        figures = f"{done:,} of {total:,} {self._unit}, {done / max(now - self._began, 0.001):,.0f}/s"
        self._bar.update(self._task, completed=done, total=total, figures=figures)
        if self._lines and now - self._told >= LINE_SECONDS:
            self._told = now
            self._errors.print(f"{self._what}: {figures}")


# --- What the options have in common -----------------------------------------------------------------


AccountArgument = Annotated[str, typer.Argument(metavar="ACCOUNT", help="Whose credits.", show_default=False)]
IdOption = Annotated[
    str | None,
    typer.Option(
        "--id",
        help="The operation id: sent again with the same id, an operation is applied once. One is made, and "
        "printed, if it is not given.",
        show_default=False,
    ),
]
WaitOption = Annotated[
    float,
    typer.Option("--wait", min=0, metavar="SECONDS", help="How long to wait for the answer; 0 only sends."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
AmountOption = Annotated[
    str | None, typer.Option("--amount", metavar="CREDITS", help="Credits, such as 1.5.", show_default=False)
]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Why; kept with the operation.", show_default=False)]
QuantityOption = Annotated[
    str | None, typer.Option("--quantity", help="Units of the hold's feature.", show_default=False)
]
MemberOption = Annotated[
    str | None, typer.Option("--member", help="The member of a pool who uses it.", show_default=False)
]
ActorOption = Annotated[
    str | None, typer.Option("--actor", help="Who does it; the user of this system unless given.", show_default=False)
]
FeatureArgument = Annotated[
    str | None, typer.Argument(metavar="FEATURE", help="A feature of the catalog.", show_default=False)
]
QuantityArgument = Annotated[
    str | None, typer.Argument(metavar="QUANTITY", help="How much of it; 1 unless given.", show_default=False)
]
SinceDayOption = Annotated[
    str | None,
    typer.Option(
        "--since", metavar="DAY", help="The first day, UTC; 30 days before the end unless given.", show_default=False
    ),
]
UntilDayOption = Annotated[
    str | None,
    typer.Option("--until", metavar="DAY", help="The day after the last; tomorrow unless given.", show_default=False),
]
LimitOption = Annotated[int, typer.Option("--limit", min=1, max=MAX_PAGE, help="How many at most.")]

_SPAN = re.compile(r"(?:([0-9]{1,9})([wdhms]))", re.ASCII)
_SPANS = re.compile(r"(?:[0-9]{1,9}[wdhms])+\Z", re.ASCII)
_SECONDS = {"w": 7 * 86400, "d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_span(text: str) -> int:
    """Read a duration such as ``30d``, ``12h`` or ``1h30m``.

    :returns: seconds.
    :raises typer.BadParameter: with what to write instead.
    """
    if not _SPANS.match(text):
        raise typer.BadParameter(f"{text!r} is no duration; write 30d, 12h, 45m, 90s, 2w or 1h30m")
    return sum(int(count) * _SECONDS[unit] for count, unit in _SPAN.findall(text))


def parse_instant(text: str) -> datetime:
    """Read an instant such as ``2027-01-31`` or ``2027-01-31T12:00:00+01:00``; UTC unless it says otherwise.

    :raises typer.BadParameter: with what to write instead.
    """
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no instant; write 2027-01-31 or 2027-01-31T12:00:00Z") from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def operator() -> str:
    """Who runs this: the user of the operating system."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"


def operate(
    id: str | None,
    wait: float,
    as_json: bool,
    account: str,
    name: str,
    send: Callable[[CreditClient, str, float | None], Result | None],
) -> None:
    """Send one operation, wait for its answer if asked to, and show it.

    :param name: the operation's, such as ``consume``.
    :param send: sends it; given the client, the operation id and how long to wait.
    """
    where = deployment()
    identity = str(uuid4()) if id is None else id
    try:
        client = CreditClient(where.broker_url, lanes=where.lanes, result_url=where.result_url, **where.tls_files)
        with client:
            result = send(client, identity, wait or None)
    except NoAnswerError:
        fail(
            f"no answer to {name} within {wait:g} s; the message waits in its lane and will be applied in its turn. "
            f"To see the answer, give the same command again with --id {identity}",
            NO_ANSWER,
        )
    except (BrokerUnavailableError, redis.RedisError, KombuError, OSError) as error:
        fail(
            f"the broker is away ({_cause(error)}), so nobody knows whether it has the message. "
            f"Give the same command again with --id {identity}: it is applied once",
            AWAY,
        )
    except QuarantinedError as error:
        fail(f"the message was quarantined: {error}. Find it with: creditlane quarantine list", FAULTS)
    except ContractError as error:
        fail(str(error), USAGE)
    except ValueError as error:  # an amount that is none
        fail(str(error), USAGE)
    except KeyboardInterrupt:
        fail(f"stopped waiting; give the same command again with --id {identity} to see the answer", INTERRUPTED)
    if result is None:
        if as_json:
            full = name if "." in name else f"credits.{name}"
            show_json({"operation": full, "id": identity, "status": "sent", "account": account})
        else:
            console().print(f"[green]sent[/] {name} for [bold]{said(account)}[/]\nid  {said(identity)}")
        return
    if as_json:
        show_json(result)
    elif result.applied:
        console().print(result_lines(result))
    if not result.applied:
        if not as_json:
            console(stderr=True).print(f"[red]refused:[/] {said(refusal(result))}", soft_wrap=True)
        raise typer.Exit(REFUSED)


def _cause(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {_first_line(cause)}"


def unknown_account(account: str) -> NoReturn:
    """End because no operation ever named this account."""
    fail(f"{Code.UNKNOWN_ACCOUNT}: no operation ever named the account {account!r}.", REFUSED)
