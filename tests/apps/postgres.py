"""PostgreSQL, with a cluster of the test's own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.apps.programs import find, serve
from tests.kernel.bed import Bed
from underpass.bench import programs as benchmarked

PORT = 5432
_OPTIONS = {
    "listen_addresses": "*",
    "fsync": "off",
    "shared_buffers": "64MB",
    "dynamic_shared_memory_type": "mmap",  # nothing of it outside its directory
}


def program(name: str) -> str:
    """Path of one of PostgreSQL's programs, which Debian keeps outside PATH; skips without."""
    return benchmarked.find(name) or find(name, "postgresql")


@contextmanager
def running(bed: Bed, where: str) -> Iterator[None]:
    """A server on `PORT` that trusts everybody; its superuser is "test".

    It is stopped, not killed: only so does it free its System V shared memory.
    """
    initdb, postgres, control = (program(name) for name in ("initdb", "postgres", "pg_ctl"))
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("there is no user postgres, and PostgreSQL refuses root")
    ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    change = ["setpriv", *ids]
    # no other user than root may pass through pytest's directories
    home = Path(tempfile.mkdtemp(prefix="underpass-test-postgres-"))
    try:
        os.chown(home, user.pw_uid, user.pw_gid)
        data = home / "data"
        made = ["-D", str(data), "--auth=trust", "--username=test", "--no-sync", "--encoding=UTF8"]
        _do(home, [*change, initdb, *made, "--locale=C"])
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all all trust\n")
        options = {**_OPTIONS, "port": str(PORT), "unix_socket_directories": str(home)}
        flags = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        try:
            log = home / "postgres.log"
            serve(bed, where, PORT, [*change, postgres, "-D", str(data), *flags], log)
            yield
        finally:
            if (data / "postmaster.pid").exists():
                _do(home, [*change, control, "stop", "-D", str(data), "-m", "immediate"])
    finally:
        shutil.rmtree(home)


def _do(home: Path, words: list[str]) -> None:
    done = subprocess.run(words, cwd=home, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
