"""Certificates made for a test, and TLS in front of servers that were built without it."""

from __future__ import annotations

import select
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from scripts.embedded import HOST

SSL_REQUEST = bytes.fromhex("0000000804d2162f")
"""What a client of PostgreSQL sends when it wants TLS."""

EXTENSIONS = """
basicConstraints = critical, CA:FALSE
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = {names}
"""


class Certificate(NamedTuple):
    """A certificate and its key, as PEM files that every user of this machine may read."""

    file: Path
    key: Path


class Authority:
    """Somebody who signs certificates."""

    def __init__(self, directory: Path, name: str) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("needs openssl to make certificates")
        self.directory = directory
        self.name = name
        self.own = Certificate(directory / f"{name}.pem", directory / f"{name}.key")
        _openssl(
            "req", "-x509", *KEY, "-subj", f"/CN={name}", "-days", "2", "-keyout", self.own.key, "-out", self.own.file,
            "-addext", "keyUsage = critical, keyCertSign, cRLSign",
        )  # fmt: skip

    def sign(self, name: str, names: str) -> Certificate:
        """Make a certificate.

        :param names: whom it is for, such as ``IP:127.0.0.1``.
        """
        made = Certificate(self.directory / f"{name}.pem", self.directory / f"{name}.key")
        request, extensions = self.directory / f"{name}.csr", self.directory / f"{name}.ext"
        extensions.write_text(EXTENSIONS.format(names=names))
        _openssl("req", *KEY, "-subj", f"/CN={name}", "-keyout", made.key, "-out", request)
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.own.file, "-CAkey", self.own.key, "-CAcreateserial",
            "-days", "2", "-extfile", extensions, "-out", made.file,
        )  # fmt: skip
        made.key.chmod(0o644)
        return made


KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


class Front:
    """Takes TLS connections and passes what is in them on to a server of this machine."""

    def __init__(self, certificate: Certificate, port: int, *, postgres: bool = False) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate.file, certificate.key)
        self._to = port
        self._postgres = postgres
        self._server = socket.create_server((HOST, 0))
        self.port: int = self._server.getsockname()[1]
        self.plain: list[bytes] = []
        """What came in without TLS: the first bytes of each."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more."""
        # It wakes the thread that waits for the next one.
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._server.accept()[0],), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with raw, suppress(OSError):
            if self._postgres:
                if raw.recv(8) != SSL_REQUEST:
                    return
                raw.sendall(b"S")
            first = raw.recv(64, socket.MSG_PEEK)
            if first[:1] != b"\x16":
                self.plain.append(first)
                return
            secure = self._context.wrap_socket(raw, server_side=True)
            with secure, socket.create_connection((HOST, self._to)) as behind:
                _relay(secure, behind)


def _relay(secure: ssl.SSLSocket, behind: socket.socket) -> None:
    """Copy both ways in one thread: a TLS socket is not for two."""
    other: dict[Any, Any] = {secure: behind, behind: secure}
    while True:
        ready = [secure] if secure.pending() else select.select(list(other), [], [])[0]
        for end in ready:
            data = end.recv(65536)
            if not data:
                return
            other[end].sendall(data)
