"""An embedded RabbitMQ: a real node of the system's package as a child process of whoever starts it.

Like its neighbours in :mod:`scripts.embedded` it listens on 127.0.0.1 only, has one random password made
at its first start and nobody called guest, keeps what it holds on disk, and ends with the process that
started it. No wheel brings it: Debian's ``rabbitmq-server``, or another package of it, has to be there.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import amqp

from scripts.embedded import (
    HOST,
    STOP_SECONDS,
    USER,
    StackError,
    _Server,
    _workers_in,
    free_port,
    open_log,
    port_is_free,
    spawn,
    wait_until,
    write_private,
)

VHOST = "creditlane"
"""The virtual host that a new node has."""

DEBIAN_PROGRAM = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
"""Behind ``/usr/sbin/rabbitmq-server``, which only root and the package's own user may call."""

HTTP_SECONDS = 30.0
"""How long one request to the management API may take."""

RABBITMQ_SETTINGS: dict[str, str] = {
    "loopback_users": "none",  # who may come at all is decided by where it listens
    "vm_memory_high_watermark.absolute": "400MB",
    "disk_free_limit.absolute": "50MB",
    # A lane's messages stay unacknowledged while the database is away, however long: ten years.
    "consumer_timeout": str(10 * 365 * 24 * 3600 * 1000),
    "heartbeat": "60",
    "log.file": "false",
    "log.console": "true",
    "log.console.level": "warning",
    "management.rates_mode": "none",  # nobody draws graphs of it
}

_ATTEMPTS = 5

# For every Erlang program that the node starts: each would listen on all interfaces for its like, and
# start an epmd for all of the machine.
_ERLANG_FLAGS = "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}"


class RabbitMQ(_Server):
    """A RabbitMQ node of its own, whose quorum queues survive a crash."""

    service = "RabbitMQ"
    option = "its argument port"
    # What a quorum queue confirmed is on disk, and a node that takes its time to end would outlive its epmd.
    death_signal = signal.SIGKILL
    stop_signals = ((signal.SIGTERM, 2 * STOP_SECONDS),)

    def __init__(self, directory: Path, port: int = 0, *, settings: Mapping[str, str] | None = None) -> None:
        """Describe a server; nothing is started.

        :param directory: where it keeps its data, its password, its log; made at the first start.
        :param port: where it listens for AMQP on 127.0.0.1; 0 for any free one.
        :param settings: lines of ``rabbitmq.conf`` on top of :data:`RABBITMQ_SETTINGS`.
        """
        super().__init__(directory, port)
        self.management_port = 0
        self._distribution_port = 0
        self._epmd_port = 0
        self._epmd: subprocess.Popen[bytes] | None = None
        self._settings = {**RABBITMQ_SETTINGS, **(settings or {})}

    @property
    def url(self) -> str:
        """The URL of the virtual host that it began with; it holds the owner's password."""
        return self.url_of(VHOST)

    def url_of(self, vhost: str, user: str = USER, password: str | None = None) -> str:
        """The URL of a virtual host.

        :param user: the owner of everything, unless given.
        :param password: that user's; the owner's unless given.
        """
        secret = self._password if password is None else password
        return f"amqp://{quote(user, safe='')}:{quote(secret, safe='')}@{HOST}:{self.port}/{quote(vhost, safe='')}"

    def create_vhost(self, vhost: str) -> str:
        """Create a virtual host unless it exists; the owner may do everything in it.

        :returns: its URL; it holds the owner's password.
        :raises StackError: when the server refuses.
        """
        self.manage("PUT", f"/api/vhosts/{quote(vhost, safe='')}", {})
        self._permit(vhost, USER, ".*", ".*", ".*")
        return self.url_of(vhost)

    def delete_vhost(self, vhost: str) -> None:
        """Delete a virtual host with its queues, whoever is connected to it; one that does not exist is no error.

        :raises StackError: when the server refuses.
        """
        self.manage("DELETE", f"/api/vhosts/{quote(vhost, safe='')}", missing_ok=True)

    def add_user(
        self, name: str, configure: str, write: str, read: str, *, vhost: str = VHOST, password: str | None = None
    ) -> str:
        """Create a user without any tag, or give it another password and other permissions.

        :param configure: a regular expression of the names that it may declare and delete; ``^$`` for none.
        :param write: of those that it may publish and bind to.
        :param read: of those that it may consume, purge and bind from.
        :param vhost: where it may do that, and nowhere else.
        :param password: a random one unless given.
        :returns: the URL of that virtual host for this user; it holds the password.
        :raises StackError: when the server refuses.
        """
        secret = secrets.token_urlsafe(24) if password is None else password
        self.manage("PUT", f"/api/users/{quote(name, safe='')}", {"password": secret, "tags": ""})
        self._permit(vhost, name, configure, write, read)
        return self.url_of(vhost, name, secret)

    def manage(self, method: str, path: str, body: object = None, *, missing_ok: bool = False) -> Any:
        """Ask the management API as the owner.

        :param path: with ``/api``; names in it quoted.
        :param body: sent as JSON, when given.
        :param missing_ok: whether "not found" is an answer like another.
        :returns: the answer decoded; ``None`` when it is empty.
        :raises StackError: with the server's status when it refuses, or does not answer.
        """
        status, answer = self._request(method, path, body)
        if status >= 400 and not (missing_ok and status == http.client.NOT_FOUND):
            raise StackError(f"RabbitMQ refused {method} {path}: {status} {answer.decode('utf-8', 'replace')[:200]}")
        return json.loads(answer) if status < 300 and answer else None

    def await_queue_on_disk(self, queue: str, vhost: str = VHOST, seconds: float = 10.0) -> bool:
        """Wait until a crash of the node cannot lose a quorum queue that was just declared.

        An older node (3.10, for one) notes a new queue's name on disk up to a second *after* it has said that
        the queue is there. A crash before that loses what the queue has confirmed and leaves it without a
        leader for good.

        :param seconds: how long at most.
        :returns: whether it is on disk.
        """
        name = f"{quote(vhost, safe='')}_{queue}".encode()
        places = self._home() / "node"
        return wait_until(lambda: any(name in path.read_bytes() for path in places.rglob("names.dets")), seconds)

    def _permit(self, vhost: str, user: str, configure: str, write: str, read: str) -> None:
        path = f"/api/permissions/{quote(vhost, safe='')}/{quote(user, safe='')}"
        self.manage("PUT", path, {"configure": configure, "write": write, "read": read})

    def _request(self, method: str, path: str, body: object) -> tuple[int, bytes]:
        credentials = base64.b64encode(f"{USER}:{self._password}".encode()).decode("ascii")
        headers = {"Authorization": f"Basic {credentials}", "Content-Type": "application/json"}
        with closing(http.client.HTTPConnection(HOST, self.management_port, timeout=HTTP_SECONDS)) as connection:
            try:
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                answer = connection.getresponse()
                return answer.status, answer.read()
            except (OSError, http.client.HTTPException) as error:
                raise StackError(
                    f"RabbitMQ's management API does not answer on port {self.management_port} ({error})."
                ) from None

    # --- Starting ---

    def _start(self, deadline: float) -> None:
        for _ in range(_ATTEMPTS):
            self.management_port, self._distribution_port, self._epmd_port = (free_port() for _ in range(3))
            try:
                super()._start(deadline)
                return
            except StackError:
                if self.running or time.monotonic() > deadline or self._has_its_ports():
                    raise
                self._end_epmd()  # somebody else was faster at one of the ports of our choice
        raise StackError(f"RabbitMQ found no ports of {HOST} to listen on.")

    def _has_its_ports(self) -> bool:
        epmd_runs = self._epmd is None or self._epmd.poll() is None
        return epmd_runs and port_is_free(self.management_port) and port_is_free(self._distribution_port)

    def _prepare(self) -> None:
        home = self._home()
        home.mkdir(mode=0o700, exist_ok=True)
        self._account.own(home)
        self._password = self._read_password(fresh=True)
        self._write(home / ".erlang.cookie", secrets.token_urlsafe(24), 0o400)
        self._write(home / "enabled_plugins", "[rabbitmq_management].\n")
        self._write(home / "rabbitmq-env.conf", "")
        with open_log(self.log) as log:
            self._account.own(self.log)
            self._epmd = spawn(
                [_program_beside("epmd"), "-address", HOST, "-port", str(self._epmd_port)],
                log=log,
                death_signal=signal.SIGKILL,
                directory=home,
                account=self._account,
                environment=self._environment(),
            )
        if not wait_until(lambda: self._epmd is None or self._epmd.poll() is not None or self._epmd_answers(), 10):
            raise StackError(f"Erlang's port mapper (epmd) does not answer on port {self._epmd_port}.")

    def _epmd_answers(self) -> bool:
        try:
            with closing(socket.create_connection((HOST, self._epmd_port), timeout=1)):
                return True
        except OSError:
            return False

    def _end_epmd(self) -> None:
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
            self._epmd = None

    def _release(self) -> None:
        self._end_epmd()
        super()._release()

    def _write(self, path: Path, text: str, mode: int = 0o600) -> None:
        write_private(path, text)
        path.chmod(mode)
        self._account.own(path)

    def _command(self) -> list[str | Path]:
        settings = {
            "listeners.tcp.default": f"{HOST}:{self.port}",
            "management.tcp.ip": HOST,
            "management.tcp.port": str(self.management_port),
            "default_user": USER,
            "default_pass": self._password,
            "default_vhost": VHOST,
            "default_permissions.configure": ".*",
            "default_permissions.write": ".*",
            "default_permissions.read": ".*",
            "default_user_tags.administrator": "true",
            **self._settings,
        }
        self._write(self._home() / "rabbitmq.conf", "".join(f"{name} = {value}\n" for name, value in settings.items()))
        return [rabbitmq_program()]

    def _environment(self) -> dict[str, str]:
        home = self._home()
        return {
            **super()._environment(),
            "HOME": str(home),
            "LANG": "C.UTF-8",
            # The script becomes the Erlang machine, instead of waiting beside it.
            "RUNNING_UNDER_SYSTEMD": "true",
            "ERL_AFLAGS": _ERLANG_FLAGS,
            "ERL_EPMD_ADDRESS": HOST,
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_CRASH_DUMP": os.devnull,  # it would hold whatever the node held, passwords too
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2",
            "RABBITMQ_NODENAME": f"{USER}@localhost",
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_CONF_ENV_FILE": str(home / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "advanced.config"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(home / "generated"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(home / "node"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(home / "node.pid"),
        }

    def _answers(self) -> bool:
        if self._epmd is not None and self._epmd.poll() is not None:
            assert self._process is not None
            self._process.kill()  # without its port mapper the node would wait, or start another one
            return False
        try:
            status, _ = self._request("GET", "/api/whoami", None)
        except StackError:
            return False
        if status == http.client.UNAUTHORIZED:
            raise StackError(
                f"The password in {self.directory / 'password'} is not that of the data beside it; "
                "put the right file back, or choose another data directory with --data."
            )
        try:
            with amqp.Connection(
                f"{HOST}:{self.port}", userid=USER, password=self._password, virtual_host=VHOST, connect_timeout=5
            ):
                return True
        except (OSError, amqp.AMQPError):
            return False

    def _leftover(self) -> int | None:
        return next(iter(_workers_in(self._home(), "beam.smp")), None)

    def _end_leftovers(self) -> None:
        super()._end_leftovers()
        for pid in _workers_in(self._home(), "epmd"):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def _program(self) -> Path:
        return rabbitmq_program()

    def _home(self) -> Path:
        return self.directory / "data"


# --- Where the programs are --------------------------------------------------------------------------


def rabbitmq_program() -> Path:
    """Find the script that starts a node.

    :raises StackError: saying what to install when there is none, or when Erlang is missing.
    """
    found = DEBIAN_PROGRAM if DEBIAN_PROGRAM.exists() else _on_path("rabbitmq-server")
    if found is None:
        raise StackError(
            "There is no RabbitMQ here; install one "
            "(on Debian and Ubuntu: apt install rabbitmq-server; its service need not run)."
        )
    _program_beside("epmd")
    return found


def is_installed() -> bool:
    """Say whether :class:`RabbitMQ` could start here."""
    try:
        rabbitmq_program()
    except StackError:
        return False
    return True


def _program_beside(name: str) -> Path:
    found = _on_path(name)
    if found is None:
        raise StackError(
            f"RabbitMQ is here, but Erlang's {name} is not on the PATH; install Erlang "
            "(on Debian and Ubuntu: apt install erlang-base)."
        )
    return found


def _on_path(name: str) -> Path | None:
    found = shutil.which(name)
    return Path(found).resolve() if found is not None else None
