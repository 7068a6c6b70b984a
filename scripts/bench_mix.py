"""The case ``mix``: a usage trace as what a service really sends, on accounts with credits of five kinds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

from creditlane.amounts import to_wire
from creditlane.client import Buffer
from scripts.bench_figures import Sample
from scripts.bench_harness import Bench
from scripts.bench_streams import measure_sending
from scripts.replay import Usage, ZipfDraw, file_digest, read_header, read_usage, recognise

TRACE = Path(__file__).with_name("sample_usage.csv")

GRANTS: tuple[dict[str, Any], ...] = (
    {"amount": "5", "source": "trial", "priority": 10, "expires_in": 7 * 86400},
    {"amount": "5", "source": "bonus", "priority": 20, "features": ["embedding"]},
    {"amount": "20", "source": "plan", "priority": 30, "expires_in": 30 * 86400},
    {"amount": "40", "source": "pack", "priority": 50, "purchase": "first"},
    {"amount": "1000000", "source": "pack", "priority": 50, "purchase": "second"},
)
"""What each account has; the last keeps everything from being refused."""

TOP_UP: dict[str, Any] = {"amount": "10", "source": "bonus", "priority": 20}
"""What an account is granted now and then."""

HELD = ("completion", "image")
"""The features that are held for and refunded: they have a price, and take time."""


class Request(NamedTuple):
    """One operation as it is sent."""

    name: str
    id: str
    arguments: dict[str, Any]


def read_trace() -> list[Usage]:
    """The rows of the trace."""
    shape = recognise(read_header(TRACE))
    rows = read_usage(TRACE, shape, ZipfDraw(shape.accounts), digest=file_digest(TRACE))
    return [row for row in rows if isinstance(row, Usage)]


def openings(account: str) -> Iterator[Request]:
    """What an account begins with."""
    yield Request("credits.open", f"open-{account}", {"account": account})
    for number, grant in enumerate(GRANTS):
        yield Request("credits.grant", f"grant-{account}-{number}", {"account": account, **grant})


def requests(rows: list[Usage]) -> Iterator[Request]:
    """The trace as operations, over and over, each time for other accounts.

    Of ten uses that take time, one is held and captured, one held and released, one refunded; the others are
    consumed at once, like everything else. One use in fifty comes with a grant.
    """
    for turn in count():
        for number, row in enumerate(rows):
            account, id = f"{row.account}.{turn}", f"{row.id}-{turn}"
            use = {
                "account": account,
                "feature": row.feature,
                "quantity": None if row.quantity is None else to_wire(row.quantity),
                "occurred_at": row.occurred_at,
            }
            kind = number % 10 if row.feature in HELD else 0
            if number % 50 == 0:
                yield Request("credits.grant", f"top-up-{id}", {"account": account, **TOP_UP})
            if kind in (1, 2):
                yield Request("credits.hold", f"hold-{id}", use)
                end = "credits.capture" if kind == 1 else "credits.release"
                yield Request(end, f"end-{id}", {"account": account, "hold": f"hold-{id}"})
            else:
                yield Request("credits.consume", id, use)
            if kind == 3:
                yield Request("credits.refund", f"refund-{id}", {"account": account, "operation": id})


def measure_mix(bench: Bench) -> Sample:
    """Through ``buffer()``, as ``metering``."""
    sent = list(islice(requests(read_trace()), bench.sizes.mix))
    accounts = dict.fromkeys(request.arguments["account"] for request in sent)
    opened = [request for account in accounts for request in openings(account)]
    with bench.lanes() as side:
        side.sent([(request.arguments["account"], request.id, None) for request in (*opened, *sent)])
        with side.client.buffer() as buffer:
            for request in opened:
                buffer.submit(*as_call(request))
        side.wait_until_quiet(len(opened), quiet=True)

        def send(buffer: Buffer, index: int) -> None:
            buffer.submit(*as_call(sent[index]))

        return measure_sending(bench, side, len(sent), send)


def as_call(request: Request) -> tuple[str, str, dict[str, Any]]:
    """The arguments of :meth:`Buffer.submit`."""
    return request.name, request.id, request.arguments
