"""PostgreSQL for tests: Debian's binaries, a data directory of its own, a loopback port, a user without rights."""

from __future__ import annotations

import glob
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PASSWORD = "s3cret/with@odd:characters"
MISSING = "PostgreSQL is not installed: apt-get install postgresql (no running server is needed)"


def binaries() -> Path | None:
    """The folder of ``initdb`` and ``pg_ctl``: the newest of Debian's, else what is on the path."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), key=lambda path: int(path.split("/")[4]))
    path = found[-1] if found else shutil.which("initdb")
    return Path(path).parent if path else None


@dataclass
class Server:
    """A running server; ``stop`` and ``start`` as an outage, ``database`` makes an empty one and returns its URL."""

    bin: Path
    folder: Path
    port: int
    user: str | None

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=60"
        self._run("pg_ctl", "-D", self.folder / "data", "-l", self.folder / "log", "-o", options, "-w", "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self.folder / "data", "-m", "immediate", "-w", "stop")

    def database(self) -> str:
        name = f"t{secrets.token_hex(4)}"
        self._run("createdb", "-h", self.folder, "-p", str(self.port), "-U", "tuner", "-w", name)
        return self.url(name)

    def url(self, name: str, password: str = PASSWORD) -> str:
        from urllib.parse import quote

        return f"postgresql://tuner:{quote(password, safe='')}@127.0.0.1:{self.port}/{name}"

    def make(self) -> None:
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        if self.user:
            account = pwd.getpwnam(self.user)
            for path in (self.folder, secret):
                os.chown(path, account.pw_uid, account.pw_gid)
        flags = ("-U", "tuner", "--auth=scram-sha-256", "--auth-local=trust", "--pwfile", secret, "-N")
        self._run("initdb", "-D", self.folder / "data", *flags, "-E", "UTF8", "--locale=C")

    def _run(self, program: str, *words: object) -> None:
        done = subprocess.run(
            [str(self.bin / program), *map(str, words)],
            check=False,
            user=self.user,
            group=self.user and pwd.getpwnam(self.user).pw_gid,
            extra_groups=[] if self.user else None,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if program != "pg_ctl" else subprocess.DEVNULL,
        )
        if done.returncode:
            raise RuntimeError(f"{program} ended with {done.returncode}: {(done.stderr or b'').decode()[-500:]}")


@contextmanager
def served(where: Path) -> Iterator[Server]:
    """A server on binaries in ``where``; everything is gone afterwards."""
    users = {entry.pw_name for entry in pwd.getpwall()}
    user = None if os.geteuid() else next(name for name in ("postgres", "nobody") if name in users)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="tuner-pg-"))  # not pytest's: another user must get there
    server = Server(where, folder, port, user)
    try:
        server.make()
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
