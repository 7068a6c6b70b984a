"""The relay: takes the providers' webhooks (payments: the way of a webhook). ``python -m workers.relay`` starts it.

A webhook is verified, stored in the inbox and only then told of: the broker is never the only copy of a payment. What
it answers makes the provider repeat a delivery that is not stored, and no other. HTTP alone: what ends TLS goes before
it. One request for each connection, and a limit on everything a client could hold.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import anyio
import psycopg
import uvicorn
from psycopg import Connection
from psycopg_pool import ConnectionPool
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from creditlane.errors import BrokerUnavailableError
from creditlane.sending import make_sender
from models.database import parameters
from models.payment_inbox import Stored, store
from models.settings import Settings, settings
from workers.crash import crash_point
from workers.providers.base import MAX_BODY_BYTES, Adapter, VerificationError
from workers.providers.configured import FETCHES, CertificatesAwayError, adapters
from workers.receiving import applying

logger = logging.getLogger(__name__)

HEADERS_SECONDS = 10.0
"""How long a client may take until its headers are there."""

BODY_SECONDS = 10.0
"""How long it may take for the body."""

WORK_SECONDS = 10.0
"""How long verifying, storing and telling may take in all; then the provider is asked to come again."""

HEALTH_SECONDS = 5.0
WAIT_SECONDS = 3.0
"""How long a webhook waits for a connection to the database."""

STATEMENT_SECONDS = 5
BROKER_SECONDS = 2.0
"""How long the broker may take: whoever is told of a row late is told by the sweep."""

REST_SECONDS = 10.0
"""How long nobody is told of anything after the broker did not confirm."""

GRACE_SECONDS = 25
"""How long it goes on with what it has in hand when it is asked to stop: longer than a webhook may take in all."""

RETRY_AFTER_SECONDS = 30
DISCARDED_BYTES = 4 * MAX_BODY_BYTES
"""How much of a body that is too large is read all the same, so that the client gets to read the answer."""

Done = TypeVar("Done")


class TooLargeError(Exception):
    """The body is larger than :data:`~workers.providers.base.MAX_BODY_BYTES`."""


class Relay:
    """What the relay has open, and what it does with a webhook.

    :param config: the settings of this process.
    :param known: the adapters of the providers that it takes webhooks of, by name.
    """

    def __init__(self, config: Settings, known: Mapping[str, Adapter]) -> None:
        self._adapters = known
        options = parameters("creditlane relay", read_only=False)
        options["options"] += f" -c statement_timeout={STATEMENT_SECONDS}s"
        self._pool: ConnectionPool[Connection[Any]] = ConnectionPool(
            config.database_url.get_secret_value(),
            kwargs=options,
            min_size=0,
            max_size=config.relay_database_connections,
            timeout=WAIT_SECONDS,
            max_idle=60.0,
            reconnect_timeout=WAIT_SECONDS,
            check=ConnectionPool.check_connection,  # one that a restart of the database left behind
            name="creditlane relay",
            open=False,
        )
        self._sender = make_sender(config.broker_url.get_secret_value(), config.tls(config.broker_url), BROKER_SECONDS)
        self._resting_until = 0.0
        # Those that fetch a certificate leave enough to the others.
        self._threads = anyio.CapacityLimiter(config.relay_database_connections + FETCHES)

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        """Open what it needs, without waiting for it, and close it."""
        self._pool.open(wait=False)
        try:
            yield
        finally:
            self._pool.close(timeout=1.0)
            self._sender.close()

    # --- In a thread ---

    def take(self, adapter: Adapter, raw: bytes, headers: Mapping[str, str]) -> Stored:
        """Verify a webhook, store it, and tell of it if it is new.

        :raises VerificationError: when it is not proven to come from the provider.
        :raises CertificatesAwayError: when that cannot be known just now.
        :raises psycopg.Error: when it is not known to be stored.
        """
        event = adapter.verify(raw, headers, datetime.now(UTC))
        with self._pool.connection() as connection:
            stored = store(connection, event, raw, "webhook")
        crash_point("after-store")
        if stored.is_new:
            self._tell(stored.id)
        return stored

    def _tell(self, event: int) -> None:
        if time.monotonic() < self._resting_until:
            return
        try:
            self._sender.send([applying(event)], retry=False)
        except BrokerUnavailableError as error:
            self._resting_until = time.monotonic() + REST_SECONDS
            logger.warning("event %d waits for the sweep, the broker is away: %s", event, error)

    def _look(self) -> None:
        with self._pool.connection() as connection:
            connection.execute("SELECT 1")

    # --- In the loop ---

    async def _thread(self, seconds: float, work: Callable[..., Done], *arguments: Any) -> Done:
        """Have a thread do something that blocks; one that takes too long is left to itself.

        :raises TimeoutError: when it does.
        """
        with anyio.fail_after(seconds):
            return await anyio.to_thread.run_sync(work, *arguments, abandon_on_cancel=True, limiter=self._threads)

    async def webhook(self, request: Request) -> Response:
        """``POST /webhooks/{provider}``."""
        began = time.monotonic()
        adapter = self._adapters.get(request.path_params["provider"])
        if adapter is None:
            return _refusal(404, "unknown_provider", "no such provider is configured here")
        response, what = await self._answer(adapter, request)
        logger.info(
            "POST /webhooks/%s %d %s, %.0f ms", adapter.name, response.status_code, what,
            1000 * (time.monotonic() - began),
        )  # fmt: skip
        return response

    async def _answer(self, adapter: Adapter, request: Request) -> tuple[Response, str]:
        """The answer to a webhook, and what the log says of it; nothing of what was sent is in either."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                raw = await _body(request)
        except TimeoutError:
            return _refusal(408, "too_slow", f"the body was not there within {BODY_SECONDS:.0f} s"), "too slow"
        except TooLargeError:
            return _refusal(413, "too_large", f"the body is more than {MAX_BODY_BYTES} bytes"), "too_large"
        except ClientDisconnect:
            return _refusal(400, "gone", "the client went away"), "the client went away"
        try:
            stored = await self._thread(WORK_SECONDS, self.take, adapter, raw, request.headers)
        except VerificationError as refused:
            return _refusal(400, refused.code, refused.sentence), refused.code
        except psycopg.Error as error:
            return _later("the event could not be stored"), f"the database: {type(error).__name__} {error.sqlstate}"
        except CertificatesAwayError as error:
            return _later("the provider's certificate could not be had"), str(error)
        except TimeoutError:
            return _later("it took too long"), f"not done within {WORK_SECONDS:.0f} s"
        except Exception as error:
            # Not its message: something of the body might be in it.
            logger.error("%s:\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            return _later("something went wrong"), type(error).__name__
        media = "application/json" if adapter.accepted else None
        return Response(adapter.accepted, media_type=media), f"event {stored.id}{'' if stored.is_new else ' again'}"

    async def health(self, _request: Request) -> Response:
        """``GET /healthz``: whether a webhook could be stored."""
        try:
            await self._thread(HEALTH_SECONDS, self._look)
        except (psycopg.Error, TimeoutError):
            return _later("the database is away")
        return JSONResponse({"status": "ok"})


async def about(_request: Request) -> Response:
    """``GET /``."""
    return PlainTextResponse("creditlane takes the webhooks of payment providers at POST /webhooks/{provider}.\n")


def _refusal(status: int, code: str, reason: str) -> Response:
    return JSONResponse({"code": code, "reason": reason}, status)


def _later(reason: str) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return JSONResponse({"code": "unavailable", "reason": reason}, 503, headers)


async def _body(request: Request) -> bytes:
    """The body as it came.

    :raises TooLargeError: when it is larger than may be.
    :raises ClientDisconnect: when it does not come to its end.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > DISCARDED_BYTES:
        raise TooLargeError
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= MAX_BODY_BYTES:
            parts.append(part)
        elif size > DISCARDED_BYTES:
            break
        else:
            parts.clear()
    if size > MAX_BODY_BYTES:
        raise TooLargeError
    return b"".join(parts)


class _Protocol(H11Protocol):
    """A connection that is closed when the headers of its request do not come: the server itself waits for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting = self.loop.call_later(HEADERS_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.cycle is None:
            self.transport.abort()


def make_app(config: Settings, known: Mapping[str, Adapter] | None = None) -> Starlette:
    """The relay as an ASGI app.

    :param known: adapters in place of those that the settings ask for.
    :raises ValueError: see :func:`workers.providers.configured.adapters`.
    """
    relay = Relay(config, adapters(config) if known is None else known)
    app = Starlette(
        routes=[
            Route("/", about),
            Route("/healthz", relay.health),
            Route("/webhooks/{provider}", relay.webhook, methods=["POST"]),
        ],
        lifespan=relay.lifespan,
    )
    app.router.redirect_slashes = False
    return app


def make_server(config: Settings, app: Starlette) -> uvicorn.Server:
    """The server of the app, with its limits."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.relay_address,
            port=config.relay_port,
            http=_Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,  # its lines have query strings
            proxy_headers=False,
            server_header=False,
            headers=[("Connection", "close")],
            limit_concurrency=config.relay_connections,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )


def main() -> None:
    """Serve until SIGTERM or SIGINT; what is in hand is finished."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # the server raises it again when it has stopped
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s: %(levelname)s] %(message)s")
    config = settings()
    known = adapters(config)
    logger.info("webhooks of: %s", ", ".join(known) or "nobody, as no provider has its secrets")
    make_server(config, make_app(config, known)).run()


if __name__ == "__main__":
    main()
