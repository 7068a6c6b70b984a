"""Where PayPal's certificates come from: an HTTPS server that proves who it is, and seldom."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scripts.embedded import HOST
from tests.security.tls import Authority, Certificate
from tests.support import eventually
from workers.providers.base import VerificationError
from workers.providers.configured import CERTIFICATES_KEPT, FETCHES, Certificates, CertificatesAwayError

PEM = b"-----BEGIN CERTIFICATE-----\nmade\n-----END CERTIFICATE-----\n"


class Host:
    """Serves whatever it is told to."""

    def __init__(self, certificate: Certificate) -> None:
        self.status, self.body = 200, PEM
        self.asked: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.asked.append(self.path)
                host.go_on.wait(60)
                self.send_response(host.status)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(host.body)))
                self.end_headers()
                self.wfile.write(host.body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer((HOST, 0), Handler)
        self.server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.file, certificate.key)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.address = f"https://{HOST}:{self.server.server_port}/certs/CERT-"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@contextmanager
def serving(certificate: Certificate) -> Iterator[Host]:
    host = Host(certificate)
    try:
        yield host
    finally:
        host.go_on.set()
        host.server.shutdown()
        host.server.server_close()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """One whose authority this machine trusts."""
    authority = Authority(tmp_path, "authority")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.own.file))
    with serving(authority.sign("here", f"IP:{HOST}")) as found:
        yield found


def test_a_certificate_is_fetched_once_and_only_so_many_are_kept(host: Host) -> None:
    certificates = Certificates()
    for _ in range(3):
        assert certificates(f"{host.address}0") == PEM
    assert host.asked == ["/certs/CERT-0"]
    for number in range(1, CERTIFICATES_KEPT):
        certificates(f"{host.address}{number}")
    certificates(f"{host.address}0")
    certificates(f"{host.address}new")
    assert len(host.asked) == CERTIFICATES_KEPT + 1
    certificates(f"{host.address}0")  # used lately
    assert len(host.asked) == CERTIFICATES_KEPT + 1
    certificates(f"{host.address}1")  # the one that was not used for longest made room
    assert len(host.asked) == CERTIFICATES_KEPT + 2


def test_what_is_not_there_is_refused_and_what_is_away_asked_for_again(host: Host) -> None:
    certificates = Certificates()
    for status, body in ((404, PEM), (302, PEM), (200, b"<html>"), (200, b" " * 70_000 + PEM)):
        host.status, host.body = status, body
        with pytest.raises(VerificationError) as refused:
            certificates(f"{host.address}0")
        assert refused.value.code == "bad_certificate"
    for status in (429, 500, 503):
        host.status = status
        with pytest.raises(CertificatesAwayError):
            certificates(f"{host.address}0")
    host.status, host.body = 200, PEM
    assert certificates(f"{host.address}0") == PEM
    assert "/elsewhere" not in host.asked


def test_nobody_else_can_pretend_to_be_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, stranger = Authority(tmp_path, "authority"), Authority(tmp_path, "stranger")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.own.file))
    for certificate in (stranger.sign("theirs", f"IP:{HOST}"), authority.sign("other", "DNS:other.example")):
        with serving(certificate) as host, pytest.raises(CertificatesAwayError, match="SSLCertVerificationError"):
            Certificates()(f"{host.address}0")


def test_whoever_asks_for_many_at_a_time_is_told_to_come_again(host: Host) -> None:
    certificates = Certificates()
    host.go_on.clear()
    with ThreadPoolExecutor(FETCHES) as threads:
        under_way = [threads.submit(certificates, f"{host.address}{number}") for number in range(FETCHES)]
        eventually(lambda: len(host.asked) == FETCHES)
        with pytest.raises(CertificatesAwayError, match="are being fetched"):
            certificates(f"{host.address}another")
        host.go_on.set()
        assert [each.result(60) for each in under_way] == [PEM] * FETCHES
    assert certificates(f"{host.address}another") == PEM
