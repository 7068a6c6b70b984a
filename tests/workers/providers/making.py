"""Events to try the adapters on: made up, or as recorded where the recordings are at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from stripe import WebhookSignature

from models.rules.facts import Fact
from workers.providers.base import Adapter, Event, Fetch, Parked, no_fetch
from workers.providers.stripe import Stripe

ROOT = Path(__file__).parents[3]
NOW = datetime(2031, 11, 21, 12, tzinfo=UTC)
"""Far from the machine's own time, which nothing here may ask for."""

CREATED = 1_790_000_500
SECRET = "whsec_made"

RECORDED = Path(os.environ.get("CREDITLANE_PAYLOADS") or ROOT.parent / "shared" / "payloads")

STRIPE = Stripe(["whsec_older", SECRET], livemode=False)


def made(name: str, **changes: Any) -> dict[str, Any]:
    """A made-up payload, with fields in place of its own."""
    value: dict[str, Any] = json.loads((ROOT / "tests" / "payloads" / f"{name}.json").read_text())
    return value | changes


def recorded(name: str) -> dict[str, Any]:
    """A recorded payload; without it the test is skipped."""
    path = RECORDED / f"{name}.json"
    if not path.exists():
        pytest.skip("no recorded payloads here: set CREDITLANE_PAYLOADS")
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def envelope(type: str, object: Mapping[str, Any], /, **changes: Any) -> dict[str, Any]:
    """A snapshot event of Stripe around an object."""
    return {
        "id": "evt_made_1",
        "object": "event",
        "api_version": "2026-10-28.endive",
        "created": CREATED,
        "data": {"object": object},
        "livemode": False,
        "pending_webhooks": 1,
        "request": {"id": None, "idempotency_key": None},
        "type": type,
    } | changes


def body(value: object) -> bytes:
    """As it comes."""
    return json.dumps(value).encode()


def signed(raw: bytes, at: datetime = NOW, secret: str = SECRET) -> dict[str, str]:
    """The headers of a delivery by Stripe, as stripe-python signs them."""
    header = WebhookSignature.generate_signature_header(raw.decode(), secret, int(at.timestamp()))
    return {"Stripe-Signature": header}


def fetching(**objects: Mapping[str, Any]) -> Fetch:
    """An API that has one object of each of these kinds, ``checkout_session`` for ``checkout.session``."""
    kinds = {kind.replace("checkout_session", "checkout.session"): value for kind, value in objects.items()}
    return lambda kind, id: kinds.get(kind)


def event_of(type: str, object: Mapping[str, Any], /, **changes: Any) -> Event:
    """An event of Stripe, verified."""
    raw = body(envelope(type, object, **changes))
    return STRIPE.verify(raw, signed(raw), NOW)


def facts_of(type: str, object: Mapping[str, Any], fetch: Fetch = no_fetch, **changes: Any) -> tuple[Fact, ...]:
    """The facts of an event of Stripe."""
    found = STRIPE.normalise(event_of(type, object, **changes), fetch)
    assert not isinstance(found, Parked), found
    return found


def fact_of(type: str, object: Mapping[str, Any], fetch: Fetch = no_fetch, **changes: Any) -> Any:
    """Its only fact."""
    (found,) = facts_of(type, object, fetch, **changes)
    return found


def parked(adapter: Adapter, event: Event, fetch: Fetch = no_fetch) -> str:
    """The code that it is parked with."""
    found = adapter.normalise(event, fetch)
    assert isinstance(found, Parked), found
    return found.code


def read_fact(adapter: Adapter, value: object, fetch: Fetch = no_fetch) -> Any:
    """The only fact of a body."""
    found = adapter.normalise(adapter.read(body(value)), fetch)
    assert not isinstance(found, Parked), found
    (only,) = found
    return only


def aliases(fact: Fact) -> dict[str, str]:
    """Its aliases by kind."""
    return {alias.kind: alias.id for alias in fact.aliases}


def at(seconds: int) -> datetime:
    """An instant as Stripe writes it."""
    return datetime.fromtimestamp(seconds, UTC)


Sign = Callable[[bytes], Mapping[str, str]]
