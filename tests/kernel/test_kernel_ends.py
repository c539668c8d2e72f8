"""Sockets that the kernel itself reads: in the map it could not close them."""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tests.kernel import initiator
from tests.kernel import test_guard as guard
from tests.kernel.bed import SERVER4, Bed, inside, run
from tests.kernel.commands import underpass
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import couple, exchange, listen
from tests.kernel.waiting import wait_until
from underpass.model import Fault, Sign
from underpass.torture.content import content
from underpass.torture.patience import patient

TO = (SERVER4, 8080)
_STREAM = 1
_NVMET = Path("/sys/kernel/config/nvmet")
_NAME = "underpass-test"
_GREETING = 128  # bytes of the first message (ICReq), and of its answer
_PORT = {"trtype": "tcp", "adrfam": "ipv4", "traddr": "127.0.0.1", "trsvcid": "4420"}
_CONNECTS = f"""
import socket
with socket.create_connection({TO}) as s:
    s.sendall(b"1234567890")
"""

FAULTS = pytest.mark.parametrize("fault", [Fault(0), Fault.KERNEL_ENDS], ids=["kept out", "twin"])


@FAULTS
def test_an_initiator_is_known_by_its_name(
    bed: Bed, plane: MakePlane, tmp_path: Path, fault: Fault
) -> None:
    """Claim: iscsid stays out though nothing is watched; no rule lets it in. Twin: is let in."""
    up = plane(faults=fault)
    named = tmp_path / "iscsid"
    shutil.copy(Path(sys.executable).resolve(), named)
    server = bed.worker("server")
    listener = listen(server, TO)
    enter = f'echo $$ >{bed.cgroup}/cgroup.procs; exec "$@"'
    command = ("sh", "-c", enter, "sh", *inside(bed.netns["client"]), str(named), "-c", _CONNECTS)
    run(*command)
    (known,) = [program for program in up.programs() if program.name == "iscsid"]
    if fault:
        assert known.verdict == "admitted"
        assert up.counters().pairs_total == 1
        return
    assert (known.verdict, known.signs) == ("kept-out", ["in-kernel"])
    assert up.counters().refused_total["guarded"] == 2
    for name in ("iscsid", known.id):
        underpass(bed.pins, "guard", "allow", name).failed(2, name, "kernel")
    assert not up.rules()
    listener.close()


@FAULTS
def test_who_was_seen_to_hand_sockets_over(bed: Bed, plane: MakePlane, fault: Fault) -> None:
    """Claim: whose socket the kernel took while it was watched stays out. Twin: does not."""
    initiator.have("iscsi_tcp")
    up = plane(guard.SOON, fault, watch=True)
    client, server = bed.worker("client"), bed.worker("server")
    near, far = couple(client, server, TO)
    others = couple(client, server, (SERVER4, 8082))
    session = initiator.hand_over(near)
    far.send(_STREAM, 1)

    def decided() -> bool:
        exchange(*others, _STREAM, rounds=1)
        return all(guard._of(up, end).verdict != "watched" for end in (client, server))

    wait_until(decided, "both programs were watched for long enough")
    initiator.give_back(near, session)
    assert guard._of(up, client).signs == ([] if fault else Sign.IN_KERNEL.words)
    near, far = couple(client, server, (SERVER4, 8081))
    exchange(near, far, _STREAM, rounds=1)
    assert up.counters().pairs_total == bool(fault)


def _serve_nvme(disk: str) -> Path:
    """In a worker: a target with this disk; returns the place of its port."""
    subsystem, port = _NVMET / "subsystems" / _NAME, _NVMET / "ports" / "1"
    subsystem.mkdir()
    (subsystem / "attr_allow_any_host").write_text("1")
    space = subsystem / "namespaces" / "1"
    space.mkdir()
    (space / "device_path").write_text(disk)
    (space / "buffered_io").write_text("1")
    (space / "enable").write_text("1")
    port.mkdir()
    for name, value in _PORT.items():
        (port / f"addr_{name}").write_text(value)
    (port / "subsystems" / _NAME).symlink_to(subsystem)
    return port


def _end_nvme(port: Path) -> None:
    subsystem = _NVMET / "subsystems" / _NAME
    (port / "subsystems" / _NAME).unlink()
    port.rmdir()
    (subsystem / "namespaces" / "1").rmdir()
    subsystem.rmdir()


def _read_by_nvme() -> bytes:
    """In a worker: connect to that target, read its disk, disconnect."""
    to = ",".join(
        f"{name}={value}"
        for name, value in _PORT.items()
        if name.startswith("tr") and name != "trtype"
    )
    with Path("/dev/nvme-fabrics").open("r+b", buffering=0) as fabrics:
        fabrics.write(f"nqn={_NAME},transport={_PORT['trtype']},{to}".encode())
        number = fabrics.read(100).split(b",")[0].removeprefix(b"instance=").decode()
    try:
        device = Path(f"/dev/nvme{number}n1")
        wait_until(lambda: device.exists() and device.read_bytes(), "the disk is there")
        return device.read_bytes()
    finally:
        Path(f"/sys/class/nvme/nvme{number}/delete_controller").write_text("1")


@FAULTS
def test_sockets_of_the_kernel_itself(bed: Bed, plane: MakePlane, fault: Fault) -> None:
    """Claim: NVMe over TCP stays out at both ends, whoever configures it. Twin: its host enters."""
    initiator.have("nvmet-tcp", "nvme-tcp")
    if not _NVMET.exists():
        run("mount", "-t", "configfs", "none", "/sys/kernel/config")
    up = plane(faults=fault)
    worker = bed.worker("server")
    # of other file systems it takes no size
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as disk:
        disk.write(content(_STREAM, 0, 1 << 20))
        disk.flush()
        port = worker.call(_serve_nvme, disk.name)
        try:
            assert worker.call(_read_by_nvme) == content(_STREAM, 0, 1 << 20)
        finally:
            worker.call(_end_nvme, port)
    refused = up.counters().refused_total
    assert (refused["kernel-socket"] >= 4, refused["peer-refused"] > 0) == (not fault, bool(fault))


def _answer_nvme() -> None:
    """In a worker: a target of our own, which answers the first message and then says no more."""
    listener = socket.create_server((_PORT["traddr"], int(_PORT["trsvcid"])))

    def serve() -> None:
        with listener, listener.accept()[0] as sock:
            sock.recv(_GREETING, socket.MSG_PEEK)
            sock.sendall(
                struct.pack("<BBBBIHBBI", 1, 0, 128, 0, 128, 0, 0, 0, 1 << 17) + bytes(112)
            )
            sock.recv(_GREETING)

    threading.Thread(target=serve, daemon=True).start()


def _connect_nvme() -> None:
    """In a worker: connect to it, in vain."""
    with contextlib.suppress(OSError), Path("/dev/nvme-fabrics").open("wb", buffering=0) as fabrics:
        to = f"traddr={_PORT['traddr']},trsvcid={_PORT['trsvcid']}"
        fabrics.write(f"nqn={_NAME},transport=tcp,{to}".encode())


def test_a_host_of_the_kernel_and_a_target_of_ours(bed: Bed, plane: MakePlane) -> None:
    """Claim: one end of the kernel's is enough for both to stay out, also where it has a file."""
    initiator.have("nvme-tcp")
    up = plane()
    target, host = bed.worker("server"), bed.worker("server")
    target.call(_answer_nvme)
    connecting = host.submit(_connect_nvme)
    wait_until(lambda: up.counters().refused_total["kernel-socket"] >= 2, "both ends are refused")
    assert (up.counters().pairs_total, up.endpoints()) == (0, [])
    target.kill()  # its host is told
    connecting.result(patient(100))
