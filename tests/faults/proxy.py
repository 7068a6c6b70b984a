"""A TCP proxy in front of Postgres that cuts a connection at a chosen answer of the server's."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit, urlunsplit

CHUNK = 1 << 16


def command_complete(tag: bytes) -> bytes:
    """How the server says that a command is done, in the protocol's own bytes."""
    return b"C" + (len(tag) + 5).to_bytes(4, "big") + tag + b"\x00"


class Proxy:
    """Passes everything on, until told to cut.

    :param url: the database behind it.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        credentials = parts.netloc.rpartition("@")[0]
        netloc = f"{credentials}@127.0.0.1:{port}"
        self.url = urlunsplit((parts.scheme, netloc, parts.path, parts.query, parts.fragment))
        """The same database, through the proxy."""
        self.cuts = 0
        """Connections cut at the answer that was named."""
        self._lock = threading.Lock()
        self._answer = b""
        self._skip = 0
        self._closed = False
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def cut_at(self, answer: bytes, skip: int = 0) -> None:
        """Cut the first connection on which the server gives this answer, and never pass the answer on.

        :param answer: bytes of the protocol; see :func:`command_complete`.
        :param skip: how many such answers are passed on first.
        """
        with self._lock:
            self._answer, self._skip = answer, skip

    def close(self) -> None:
        """Take no more connections."""
        self._closed = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                continue
            for one, other, watched in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pump, args=(one, other, watched), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, watched: bool) -> None:
        carried = b""
        try:
            while chunk := source.recv(CHUNK):
                if watched:
                    # An answer may lie across two chunks; what of it was passed on before is worth nothing alone.
                    if self._found(carried + chunk):
                        break
                    carried = (carried + chunk)[-max(1, len(self._answer) - 1) :]
                sink.sendall(chunk)
        except OSError:
            pass
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _found(self, seen: bytes) -> bool:
        with self._lock:
            if not self._answer or self._answer not in seen:
                return False
            if self._skip:
                self._skip -= 1
                return False
            self._answer = b""
            self.cuts += 1
            return True
