"""The test bed: namespaces, a router between them, cgroups and a pins directory of one test.

Everything is named after the process that runs the tests, is undone in reverse order however the
test ends, and what a dead run left behind is swept by the next.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.kernel.kernel_objects import wait_gone
from tests.kernel.waiting import wait_until
from underpass import kept, pinning
from underpass.model import Settings
from underpass.torture.kernel_objects import pinned
from underpass.torture.patience import patient
from underpass.torture.worker import Place, Worker

REPOSITORY = Path(__file__).parents[2]
BPFFS = Path("/sys/fs/bpf")
NETNS = Path("/run/netns")
_NAME = re.compile(r"^(?:pods-|policy-)?(?:up-test|underpass-test)-(\d+)(?:-|$)")
_NUMBERS = itertools.count(1)

USUAL = Settings(reproof_seconds=patient(Settings().reproof_seconds))
"""As by default; under emulation a test's few messages would meet proofs, too."""
ADMITTING = replace(USUAL, admit_unknown=True)
"""For tests that are not about the guard: no program is watched first."""
UNGUARDED = replace(ADMITTING, allow=(Path("/proc/self/exe").readlink().name[:31],))
"""For tests that do on purpose what the guard keeps out."""
USUAL_BUFFER = "net.ipv4.tcp_rmem=4096 131072 6291456"
"""The kernel's own; a namespace would take over the host's."""
CLIENT4, SERVER4, ROUTER4 = "10.77.0.1", "10.77.0.2", "10.77.0.254"
CLIENT6, SERVER6 = "fd77::1", "fd77::2"


def run(*command: str | Path) -> str:
    """Run a set-up command; raises CalledProcessError with its output when it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        text = f"{' '.join(map(str, command))}: {done.stderr.strip()}"
        raise AssertionError(text)
    return done.stdout


def inside(namespace: str) -> tuple[str, ...]:
    """Words that run a command in a namespace; `ip -n` would remount /, which a chroot forbids."""
    return ("nsenter", f"--net=/run/netns/{namespace}")


def cgroup2() -> Path:
    """Where cgroup v2 is mounted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise AssertionError("no cgroup v2 is mounted here")


@dataclass
class Bed:
    """One test's surroundings; see `make_bed`."""

    name: str
    undo: contextlib.ExitStack
    cgroup: Path
    """What underpass is attached to."""
    outside: Path
    """A cgroup beside it: a process there stands for one on another node."""
    pins: Path
    netns: dict[str, str] = field(default_factory=dict)
    """Names under /run/netns of "client", "server" and "router"."""
    workers: list[Worker] = field(default_factory=list)

    def worker(self, where: str, *, outside: bool = False) -> Worker:
        """A new process in the namespace `where`, killed when the test ends."""
        place = Place(self.netns[where], self.outside if outside else self.cgroup)
        worker = Worker(place, f"{where}-{len(self.workers)}")  # a program of its own
        self.undo.callback(worker.kill)
        self.workers.append(worker)
        return worker

    def kill_workers(self) -> None:
        """End all workers and all that they started, and with them their sockets."""
        for worker in self.workers:
            worker.kill()
        for cgroup in (self.cgroup, self.outside):
            empty_cgroup(cgroup)

    def within(self, where: str, *command: str) -> str:
        """Run a set-up command inside the namespace `where`."""
        return run(*inside(self.netns[where]), *command)

    def add_netns(self, where: str) -> None:
        """Add a namespace with only its loopback, reached by no other."""
        name = f"{self.name.replace('underpass-', 'up-')}-{where}"
        self.undo.callback(remove_netns, name)
        run("ip", "netns", "add", name)
        self.netns[where] = name
        self.within(where, "ip", "link", "set", "lo", "up")
        # 100,000 short connections need the ports
        self.within(where, "sysctl", "-qw", "net.ipv4.ip_local_port_range=10000 65000")
        self.within(where, "sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1")
        self.within(where, "sysctl", "-qw", USUAL_BUFFER)


def make_bed(undo: contextlib.ExitStack) -> Bed:
    """Build a bed: client and server namespaces joined by a bridge in a router namespace.

    `undo` gets every step's reverse before the next step is taken.
    """
    mount_bpffs()
    name = f"underpass-test-{os.getpid()}-{next(_NUMBERS)}"
    inside, outside = cgroup2() / name, cgroup2() / f"{name}-outside"
    for cgroup in (inside, outside):
        cgroup.mkdir()
        undo.callback(remove_cgroup, cgroup)
    pins = BPFFS / name
    undo.callback(remove_pins, pins)
    bed = Bed(name, undo, inside, outside, pins)
    for where in ("router", "client", "server"):
        bed.add_netns(where)
    bed.within("router", "ip", "link", "add", "br0", "type", "bridge")
    bed.within("router", "ip", "addr", "add", f"{ROUTER4}/24", "dev", "br0")
    bed.within("router", "ip", "link", "set", "br0", "up")
    for forwarding in ("net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0"):
        bed.within("router", "sysctl", "-qw", forwarding)
    bed.within("router", "sysctl", "-qw", "net.ipv4.conf.br0.send_redirects=0")
    for where, address4, address6 in (("client", CLIENT4, CLIENT6), ("server", SERVER4, SERVER6)):
        join(bed, where, address4, address6)
    return bed


def join(bed: Bed, where: str, address4: str, address6: str) -> None:
    """Plug the namespace into the router's bridge, as a pod is into its node's."""
    namespace, router = bed.netns[where], bed.netns["router"]
    port = f"port-{where}"
    veth = (*inside(router), "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0")
    run(*veth, "netns", namespace)
    run(*inside(router), "ip", "link", "set", port, "master", "br0")
    # where bridges call iptables, a hairpin connection leaves by the port it came from
    run(*inside(router), "ip", "link", "set", port, "type", "bridge_slave", "hairpin", "on")
    run(*inside(router), "ip", "link", "set", port, "up")
    run(*inside(namespace), "ip", "addr", "add", f"{address4}/24", "dev", "eth0")
    run(*inside(namespace), "ip", "addr", "add", f"{address6}/64", "dev", "eth0", "nodad")
    run(*inside(namespace), "ip", "link", "set", "eth0", "up")
    run(*inside(namespace), "ip", "route", "add", "default", "via", ROUTER4)


def mount_bpffs() -> None:
    """Mount bpffs where tests pin, if it is not mounted yet."""
    if not os.path.ismount(BPFFS):
        run("mount", "-t", "bpf", "bpf", BPFFS)


def remove_netns(name: str) -> None:
    """Delete a namespace if it is there."""
    if (NETNS / name).exists():
        run("ip", "netns", "del", name)


def empty_cgroup(cgroup: Path) -> None:
    """End every process that a test left in its cgroup."""

    def emptied() -> bool:
        left = (cgroup / "cgroup.procs").read_text().split()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        return not left

    wait_until(emptied, f"{cgroup} is empty", 10)


def remove_cgroup(cgroup: Path) -> None:
    """End what a test left in its cgroup and below, and delete it."""
    if not cgroup.exists():
        return
    for below in [path for path in cgroup.iterdir() if path.is_dir()]:
        remove_cgroup(below)
    empty_cgroup(cgroup)

    def removed() -> bool:
        with contextlib.suppress(OSError):
            cgroup.rmdir()
        return not cgroup.exists()

    wait_until(removed, f"remove {cgroup}", 10)


def remove_pins(pins: Path) -> None:
    """Delete a pins directory: links detach and maps go as their last name does."""
    kept.remove(pins)
    for path in (pins, *pins.parent.glob(f"{pins.name}-*")):
        objects = pinned(path)
        pinning.remove(path)
        wait_gone(objects)


def leftovers(pid: int | None = None) -> list[str]:
    """What tests left behind: of run `pid`, or of every run that is dead."""
    found = []
    for directory in (NETNS, cgroup2(), BPFFS, kept.DIRECTORY):
        if not directory.is_dir():
            continue
        for path in directory.iterdir():
            match = _NAME.match(path.name)
            if match is None:
                continue
            owner = int(match.group(1))
            if owner == pid or (pid is None and not Path(f"/proc/{owner}").exists()):
                found.append(str(path))
    return sorted(found)


def sweep() -> None:
    """Remove what dead runs left behind."""
    for left in map(Path, leftovers()):
        if left.parent == NETNS:
            remove_netns(left.name)
        elif left.parent == kept.DIRECTORY:
            left.unlink()
        elif left.parent == BPFFS:
            shutil.rmtree(left)
        else:
            remove_cgroup(left)
