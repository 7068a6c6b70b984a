"""Those whom notices go to, on loopback: a mail server, and a receiver of webhooks. They can refuse, or be slow."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword

HOST = "127.0.0.1"


class MailServer:
    """Takes e-mails.

    :param tls: it speaks nothing but TLS with this.
    :param starttls: it takes e-mails only after STARTTLS, with this.
    :param login: user and password that it asks for.
    """

    def __init__(
        self,
        tls: ssl.SSLContext | None = None,
        login: tuple[str, str] | None = None,
        starttls: ssl.SSLContext | None = None,
    ) -> None:
        self.mails: list[EmailMessage] = []
        self.recipients: list[str] = []
        self.reply = "250 OK"
        """To each recipient."""
        self.after_data = "250 OK"

        def authenticate(*given: Any) -> AuthResult:
            data = given[-1]
            known = isinstance(data, LoginPassword) and login == (data.login.decode(), data.password.decode())
            return AuthResult(success=known, handled=known)

        options: dict[str, Any] = {"authenticator": authenticate, "auth_require_tls": False}
        if login is not None:
            options["auth_required"] = True
        if starttls is not None:
            options |= {"tls_context": starttls, "require_starttls": True}
        self._controller = Controller(
            self, hostname=HOST, port=_free_port(), ssl_context=tls, server_hostname=HOST, **options
        )
        self._controller.start()
        self.port: int = self._controller.port

    async def handle_RCPT(self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any) -> str:
        """One recipient."""
        if self.reply.startswith("250"):
            envelope.rcpt_tos.append(address)
        return self.reply

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:
        """One e-mail."""
        if self.after_data.startswith("250"):
            mail = message_from_bytes(envelope.content, policy=policy.default)
            assert isinstance(mail, EmailMessage)
            self.mails.append(mail)
            self.recipients += envelope.rcpt_tos
        return self.after_data

    def close(self) -> None:
        """Take no more."""
        self._controller.stop()


class Hook(NamedTuple):
    """What was posted."""

    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """Takes webhooks."""

    def __init__(self) -> None:
        self.hooks: list[Hook] = []
        self.status = 200
        self.location: str | None = None
        """Where it sends one on to."""
        self.first: Callable[[], None] = lambda: None
        """Called before it answers."""
        self.drips = threading.Event()
        """Set: it answers one byte at a time, and never comes to an end."""
        self.ended = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.hooks.append(Hook(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                receiver.first()
                try:
                    if receiver.drips.is_set():
                        while not receiver.ended.wait(0.05):
                            self.wfile.write(b"z")
                        return
                    self.send_response(receiver.status)
                    if receiver.location is not None:
                        self.send_header("Location", receiver.location)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                except OSError:
                    pass  # nobody waits any more

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://{HOST}:{self._server.server_port}/hook?of=credits"

    def close(self) -> None:
        """Take no more."""
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as found:
        port: int = found.getsockname()[1]
        return port
