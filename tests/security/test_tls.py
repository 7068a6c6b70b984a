"""TLS to brokers and database: the right authority connects, a wrong one, a wrong name and plain text do not."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import amqp
import psycopg
import pytest
import redis
from kombu import Connection
from kombu.exceptions import KombuError
from pydantic import SecretStr, ValidationError

from creditlane.client import CreditClient
from creditlane.contract import Balance
from creditlane.errors import BrokerUnavailableError, NoAnswerError
from creditlane.lanes import lane_of
from creditlane.tls import tls_options
from models.settings import Settings
from scripts.embedded import HOST, Stack, free_port, temporary_directory
from scripts.rabbitmq import RabbitMQ
from tests.brokers import need_rabbitmq
from tests.conftest import LANES
from tests.security.conftest import Run
from tests.security.tls import Authority, Certificate, Front
from tests.support import eventually, owned_lanes, value
from tests.workers.test_poison import task

pytestmark = pytest.mark.xdist_group("tls")


class Papers(NamedTuple):
    """Who trusts whom."""

    ca: Path
    other_ca: Path
    server: Certificate
    elsewhere: Certificate
    """Of the same authority, for another host."""
    client: Certificate


@pytest.fixture(scope="module")
def papers() -> Iterator[Papers]:
    with temporary_directory() as directory:
        ours, other = Authority(directory, "ours"), Authority(directory, "other")
        yield Papers(
            ours.own.file,
            other.own.file,
            ours.sign("server", "IP:127.0.0.1,DNS:localhost"),
            ours.sign("elsewhere", "DNS:elsewhere.example"),
            ours.sign("client", "DNS:client"),
        )


class Secure(NamedTuple):
    """A broker with TLS."""

    url: str
    elsewhere_url: str
    """The same one, which shows the certificate of another host."""
    plain_url: str
    """Plain text at the port of TLS."""
    files: dict[str, Path]
    front: Front | None


def at(url: str, port: int, scheme: str) -> str:
    """A URL of the same server at another port."""
    before, _, after = url.partition("://")[2].rpartition("@")
    return f"{scheme}://{before}@{HOST}:{port}/{after.partition('/')[2]}"


@pytest.fixture
def secure_redis(stack: Stack, broker_url: str, papers: Papers) -> Iterator[Secure]:
    """Redis behind TLS."""
    front, elsewhere = (Front(certificate, stack.redis.port) for certificate in (papers.server, papers.elsewhere))
    yield Secure(
        at(broker_url, front.port, "rediss"),
        at(broker_url, elsewhere.port, "rediss"),
        at(broker_url, front.port, "redis"),
        {"ca": papers.ca},
        front,
    )
    front.close()
    elsewhere.close()


@pytest.fixture(scope="module")
def tls_node(papers: Papers) -> Iterator[tuple[RabbitMQ, int]]:
    """A RabbitMQ with TLS that wants to see its clients' certificates, and its port."""
    need_rabbitmq()
    port = free_port()
    settings = {
        "listeners.ssl.default": f"{HOST}:{port}",
        "ssl_options.cacertfile": str(papers.ca),
        "ssl_options.certfile": str(papers.server.file),
        "ssl_options.keyfile": str(papers.server.key),
        "ssl_options.verify": "verify_peer",
        "ssl_options.fail_if_no_peer_cert": "true",
    }
    with temporary_directory() as directory:
        node = RabbitMQ(directory / "rabbitmq", settings=settings).start()
        yield node, port
        node.kill()


@pytest.fixture
def secure_rabbitmq(tls_node: tuple[RabbitMQ, int], papers: Papers) -> Iterator[Secure]:
    """That RabbitMQ."""
    node, port = tls_node
    elsewhere = Front(papers.elsewhere, node.port)
    url = node.url
    yield Secure(
        at(url, port, "amqps"),
        at(url, elsewhere.port, "amqps"),
        at(url, port, "amqp"),
        {"ca": papers.ca, "certificate": papers.client.file, "key": papers.client.key},
        None,
    )
    elsewhere.close()


@pytest.fixture(params=["redis", "rabbitmq"])
def secure(request: pytest.FixtureRequest) -> Secure:
    """Each broker with TLS."""
    found: Secure = request.getfixturevalue(f"secure_{request.param}")
    return found


def connect(url: str, **files: Path) -> None:
    """Connect as the libraries do: kombu for queues, and for a Redis the Redis library for answers."""
    options = tls_options(url, **files)
    with Connection(url, ssl=options or False, connect_timeout=5) as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=5)
        assert connection.default_channel.queue_declare("nobody's", auto_delete=True).queue == "nobody's"
    if url.startswith("redis"):
        with closing(redis.Redis.from_url(url, socket_connect_timeout=5, **(options or {}))) as store:
            store.ping()


REFUSED = (KombuError, ssl.SSLError, redis.RedisError, amqp.AMQPError, OSError)


def test_the_right_authority_connects(secure: Secure) -> None:
    connect(secure.url, **secure.files)


def test_a_name_in_place_of_a_number_connects(secure: Secure) -> None:
    connect(secure.url.replace(HOST, "localhost"), **secure.files)


def test_a_wrong_authority_is_refused(secure: Secure, papers: Papers) -> None:
    with pytest.raises(REFUSED, match="CERTIFICATE_VERIFY_FAILED"):
        connect(secure.url, **{**secure.files, "ca": papers.other_ca})


def test_the_systems_authorities_do_not_vouch_for_it(secure: Secure) -> None:
    with pytest.raises(REFUSED, match="CERTIFICATE_VERIFY_FAILED"):
        connect(secure.url)


def test_a_certificate_of_another_host_is_refused(secure: Secure) -> None:
    with pytest.raises(REFUSED, match="CERTIFICATE_VERIFY_FAILED"):
        connect(secure.elsewhere_url, **secure.files)


def test_plain_text_is_refused(secure: Secure) -> None:
    with pytest.raises(REFUSED):
        connect(secure.plain_url)


def test_a_broker_that_asks_for_a_certificate_gets_it(secure_rabbitmq: Secure, papers: Papers) -> None:
    with pytest.raises(REFUSED):
        connect(secure_rabbitmq.url, ca=papers.ca)


# --- Workers ---


def environment(secure: Secure) -> dict[str, str]:
    return {f"CREDITLANE_BROKER_{name.upper()}": str(path) for name, path in secure.files.items()}


def test_workers_and_beat_work_over_tls(secure: Secure, database: str, run: Run, papers: Papers) -> None:
    for kind in ("lanes", "general", "beat"):
        run(kind, secure.url, database, **environment(secure))
    eventually(lambda: owned_lanes(database) == LANES, what="the worker takes all lanes")
    ca, certificate, key = map(secure.files.get, ("ca", "certificate", "key"))
    with CreditClient(secure.url, lanes=LANES, ca=ca, certificate=certificate, key=key) as client:
        answer = client.open("alice", id="open", wait=20)
        assert answer is not None
        assert answer.applied
        eventually(lambda: asked(client) is not None, what="the general worker answers")
    assert value(database, "SELECT count(*) FROM operations") == 1
    assert secure.front is None or secure.front.plain == []


def asked(client: CreditClient) -> Balance | None:
    """The balance, once there is somebody to ask."""
    try:
        return client.balance("alice", wait=5)
    except (BrokerUnavailableError, NoAnswerError):
        return None


def test_a_client_that_trusts_another_authority_sends_nothing(secure: Secure, papers: Papers) -> None:
    with CreditClient(secure.url, lanes=LANES, ca=papers.other_ca) as client:
        with pytest.raises(BrokerUnavailableError):
            client.open("alice", id="open")
        with pytest.raises(BrokerUnavailableError):
            client.open("alice", id="open", wait=2)
    assert secure.front is None or secure.front.plain == []


def test_workers_that_trust_another_authority_take_nothing(
    secure_redis: Secure, stack: Stack, broker_url: str, database: str, run: Run, papers: Papers
) -> None:
    with redis.Redis.from_url(broker_url) as store:
        store.lpush(lane_of("alice", LANES), task("credits.open", "open", {"account": "alice"}))
        started = [
            run(kind, secure_redis.url, database, CREDITLANE_BROKER_CA=str(papers.other_ca))
            for kind in ("lanes", "general", "beat")
        ]
        eventually(
            lambda: all("CERTIFICATE_VERIFY_FAILED" in process.logged() for process in started), what="they say so"
        )
        assert store.llen(lane_of("alice", LANES)) == 1
    assert secure_redis.front is not None
    assert secure_redis.front.plain == []
    assert value(database, "SELECT count(*) FROM operations") == 0


# --- The database ---


@pytest.fixture
def secure_postgres(stack: Stack, papers: Papers) -> Iterator[Front]:
    front = Front(papers.server, stack.postgres.port, postgres=True)
    yield front
    front.close()


def test_a_worker_reaches_the_database_over_tls(
    secure_postgres: Front, database: str, broker_url: str, run: Run, papers: Papers
) -> None:
    url = at(database, secure_postgres.port, "postgresql")
    run("lanes", broker_url, f"{url}?sslmode=verify-full&sslrootcert={papers.ca}")
    eventually(lambda: owned_lanes(database) == LANES, what="the worker takes all lanes")
    with psycopg.connect(f"{url}?sslmode=verify-full&sslrootcert={papers.ca}") as connection:
        assert connection.pgconn.ssl_in_use


def test_a_database_of_another_authority_host_or_without_tls_is_refused(
    secure_postgres: Front, stack: Stack, database: str, papers: Papers
) -> None:
    url = at(database, secure_postgres.port, "postgresql")
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        psycopg.connect(f"{url}?sslmode=verify-full&sslrootcert={papers.other_ca}")
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(f"{url}?sslmode=disable")
    with pytest.raises(psycopg.OperationalError, match="does not support SSL"):
        psycopg.connect(f"{database}?sslmode=verify-full&sslrootcert={papers.ca}")
    with closing(Front(papers.elsewhere, stack.postgres.port, postgres=True)) as front:
        elsewhere = at(database, front.port, "postgresql")
        with pytest.raises(psycopg.OperationalError, match=HOST):
            psycopg.connect(f"{elsewhere}?sslmode=verify-full&sslrootcert={papers.ca}")


# --- What is refused before anything is connected ---


def test_the_check_cannot_be_left_out(papers: Papers) -> None:
    for options in (tls_options("rediss://h/0"), tls_options("amqps://h/v", ca=papers.ca)):
        assert options is not None
        assert ssl.CERT_REQUIRED in (options.get("ssl_cert_reqs"), options.get("cert_reqs"))
    for url in ("rediss://h/0?ssl_cert_reqs=none", "amqps://h/v?ssl_check_hostname=false", "redis://h/0?ssl="):
        with pytest.raises(ValueError, match="not set in the URL"):
            tls_options(url)
    with pytest.raises(ValueError, match="the URL is one without"):
        tls_options("redis://h/0", ca=papers.ca)
    with pytest.raises(ValueError, match="no certificate"):
        tls_options("rediss://h/0", key=papers.client.key)
    assert tls_options("redis://h/0") is None


GOOD: dict[str, Any] = {"broker_url": "redis://:pa55word@h/0", "database_url": "postgresql://u:pa55word@h/d"}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"broker_url": "http://:pa55word@h/0"}, "not a broker URL"),
        ({"broker_url": "redis://:pa55word@h:port/0"}, "not a broker URL"),
        ({"broker_url": "redis://:pa55word/0"}, "not a broker URL"),
        ({"broker_url": "redis://:pa55word#@h/0"}, "not a broker URL"),
        ({"broker_url": "pa55word"}, "not a broker URL"),
        ({"result_url": "pa55word"}, "not a broker URL"),
        ({"database_url": "pa55word"}, "not a connection URL"),
        ({"database_url": "postgresql://u:pa55word@h/d?nothing=1"}, "not a connection URL"),
        ({"database_url": "postgresql://u:pa55word@h/d?sslmode=require"}, "checks no certificate"),
        ({"database_url": "postgresql://u:pa55word@h/d?sslmode=prefer"}, "checks no certificate"),
        ({"broker_url": "rediss://:pa55word@h/0?ssl_cert_reqs=none"}, "not set in the URL"),
        ({"broker_ca": __file__}, "the URL is one without"),
        ({"broker_ca": "/nowhere"}, "broker_ca"),
    ],
)
def test_settings_that_make_no_sense_are_refused_without_showing_them(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says) as caught:
        Settings(**{**GOOD, **wrong})
    assert "pa55word" not in str(caught.value)
    assert "pa55word" not in repr(caught.value)


def test_settings_that_are_passed_on_empty_are_not_set(papers: Papers) -> None:
    assert Settings(**GOOD, broker_ca="", broker_certificate="").broker_ca is None
    settings = Settings(**{**GOOD, "broker_url": "rediss://:x@h/0", "broker_ca": papers.ca})
    assert settings.tls(SecretStr("amqps://h/v")) == tls_options("amqps://h/v", ca=papers.ca)
