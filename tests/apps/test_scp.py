"""ssh and scp through the shortcut: what they carry is what was sent."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest

from tests.apps.hasher import parts
from tests.apps.programs import STREAMS, Checked, Compare, ask, find, serve
from tests.kernel.bed import SERVER4, Bed, run
from underpass.torture.plans import MIB

PORT = 2222
SIZE = 50 * MIB
_ECHOED = 5 * MIB
_PRIVILEGE_SEPARATION = Path("/run/sshd")
"""Directory that Debian's sshd insists on; its service makes it."""

_SSHD = """
Port {port}
HostKey {directory}/host
AuthorizedKeysFile {directory}/key.pub
PidFile none
StrictModes no
UsePAM no
UseDNS no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
Subsystem sftp internal-sftp
"""
_SSH = """
Host *
Port {port}
User root
IdentityFile {directory}/key
IdentitiesOnly yes
IdentityAgent none
BatchMode yes
StrictHostKeyChecking no
UserKnownHostsFile {directory}/known
GlobalKnownHostsFile none
LogLevel ERROR
"""


def test_scp_and_ssh_are_right(bed: Bed, compare: Compare, tmp_path: Path) -> None:
    """Claim: scp copies 50 MiB there and back, and ssh pipes bytes through a command, unchanged."""
    sshd = find("sshd", "openssh-server")
    ssh, scp = (find(name, "openssh-client") for name in ("ssh", "scp"))
    if any(line.startswith("root:!") for line in Path("/etc/shadow").read_text().splitlines()):
        pytest.skip("root's account is locked, which sshd respects; unlock it: usermod -p '*' root")
    for name in ("host", "key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name)
    for name, text in (("sshd.conf", _SSHD), ("ssh.conf", _SSH)):
        (tmp_path / name).write_text(text.format(port=PORT, directory=tmp_path))
    if not _PRIVILEGE_SEPARATION.exists():
        _PRIVILEGE_SEPARATION.mkdir(mode=0o755)
        bed.undo.callback(_PRIVILEGE_SEPARATION.rmdir)
    with (tmp_path / "source").open("wb") as file:
        file.writelines(parts(1, SIZE))
    words = [sshd, "-D", "-e", "-f", str(tmp_path / "sshd.conf")]
    serve(bed, "server", PORT, words, tmp_path / "sshd.log")
    compare("ssh and scp", _copy, ssh, scp, tmp_path, floor=STREAMS)


def _copy(ssh: str, scp: str, directory: Path) -> Checked:
    """In a worker: copy a file there and back, and pipe bytes through `cat`."""
    config = ["-F", str(directory / "ssh.conf")]
    copying = [scp, "-q", *config]
    source, there, back = (directory / name for name in ("source", "there", "back"))
    piped = b"".join(parts(2, _ECHOED))
    checked = Checked(2 * SIZE + 2 * _ECHOED)
    with checked.timed():
        ask([*copying, str(source), f"{SERVER4}:{there}"])
        ask([*copying, f"{SERVER4}:{there}", str(back)])
        assert ask([ssh, *config, SERVER4, "cat"], piped) == piped
    for copy in there, back:
        assert filecmp.cmp(copy, source, shallow=False), copy
        copy.unlink()
    return checked
