"""Pods and namespaces from the Kubernetes API server: list, then watch, for ever.

By `http.client`, `ssl` and `msgspec`, which the agent has anyway: `lightkube` with `httpx` costs
14 MiB of resident memory more, for one request that stays open.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from underpass.errors import UnderpassError
from underpass.pod import Pod

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: Bytes of a list, and of one event: larger ones are refused, not held.
_MOST_LIST = 64 << 20
_MOST_EVENT = 4 << 20
#: Seconds that the server keeps a watch open, and for which a connection may say nothing.
WATCH_SECONDS = 300
_SILENCE = WATCH_SECONDS + 30
_ANSWER = 20.0
_GONE = 410
#: Seconds between tries after an error: doubled each time, with chance.
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
#: It repeats all of the object.
_BULKY = "kubectl.kubernetes.io/last-applied-configuration"
_MIRROR = "kubernetes.io/config.mirror"
_METADATA_ONLY = (
    "application/json;as=PartialObjectMetadata{list};g=meta.k8s.io;v=v1, application/json"
)


@dataclass(frozen=True)
class Access:
    """How the API server is reached.

    Attributes:
        host: name or address.
        port: its port.
        token: file of the token, read anew for each connection, as it is rotated; None: none.
        authority: file of the certificates that it is checked against.
        node: name of this node.
    """

    host: str
    port: int
    token: Path | None
    authority: Path
    node: str

    @contextlib.contextmanager
    def connected(self, seconds: float) -> Iterator[http.client.HTTPSConnection]:
        """A connection; it may say nothing for so long.

        Raises:
            OSError: the server is not reached, or is not who it should be.
        """
        context = ssl.create_default_context(cafile=str(self.authority))
        connection = http.client.HTTPSConnection(
            self.host, self.port, timeout=seconds, context=context
        )
        try:
            connection.connect()
            yield connection
        finally:
            connection.close()

    def ask(
        self,
        connection: http.client.HTTPSConnection,
        target: str,
        accept: str = "application/json",
    ) -> http.client.HTTPResponse:
        """The answer to a GET, whatever its status; its body is still to be read.

        Raises:
            OSError: the connection breaks, or the token cannot be read.
            HTTPException: what comes is no HTTP.
        """
        headers = {"Accept": accept, "User-Agent": "underpass"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token.read_text().strip()}"
        connection.request("GET", target, headers=headers)
        return connection.getresponse()


def in_cluster(node: str) -> Access | None:
    """Access by the service account of the pod that this process is in; None outside of pods."""
    host, port = (os.environ.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
    if not (host and port.isdigit() and (_ACCOUNT / "token").exists()):
        return None
    return Access(host, int(port), _ACCOUNT / "token", _ACCOUNT / "ca.crt", node)


# -- what it says ----------------------------------------------------------------------------


class _Metadata(msgspec.Struct):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resourceVersion: str = ""  # noqa: N815 - the API's own
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class _Container(msgspec.Struct):
    name: str = ""
    containerID: str = ""  # noqa: N815


class _Status(msgspec.Struct):
    containerStatuses: list[_Container] | None = None  # noqa: N815
    initContainerStatuses: list[_Container] | None = None  # noqa: N815
    ephemeralContainerStatuses: list[_Container] | None = None  # noqa: N815


class _Spec(msgspec.Struct):
    hostNetwork: bool = False  # noqa: N815


class Object(msgspec.Struct):
    """A pod or a namespace, as far as it is of use here."""

    metadata: _Metadata
    spec: _Spec = msgspec.field(default_factory=_Spec)
    status: _Status = msgspec.field(default_factory=_Status)


class _List(msgspec.Struct):
    metadata: _Metadata
    items: list[Object] | None = None


class _Error(msgspec.Struct):
    code: int = 0
    message: str = ""


class _Event(msgspec.Struct):
    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR"]
    object: msgspec.Raw


_LISTS = msgspec.json.Decoder(_List)
_EVENTS = msgspec.json.Decoder(_Event)
_OBJECTS = msgspec.json.Decoder(Object)
_ERRORS = msgspec.json.Decoder(_Error)


def pod_of(found: Object) -> Pod:
    """The pod that the API server means, named as its cgroup is. Pure."""
    about = found.metadata
    annotations = {k: v for k, v in (about.annotations or {}).items() if k != _BULKY}
    status = found.status
    every = (
        status.containerStatuses,
        status.initContainerStatuses,
        status.ephemeralContainerStatuses,
    )
    return Pod(
        namespace=about.namespace,
        name=about.name,
        uid=annotations.get(_MIRROR, about.uid),
        labels=about.labels or {},
        annotations=annotations,
        containers={
            one.containerID.rpartition("//")[2]: one.name
            for statuses in every
            for one in statuses or ()
            if one.containerID
        },
        host_network=found.spec.hostNetwork,
    )


# -- watching --------------------------------------------------------------------------------


class Kind(NamedTuple):
    """Which objects a watch is for.

    Attributes:
        path: of the collection.
        selector: of fields; empty for all.
        slim: metadata is all that is wanted.
    """

    path: str
    selector: str
    slim: bool


class Gone(Exception):
    """The server no longer has what came after our version: list anew, at once."""


class Watch:
    """Keeps the objects of one kind, in a thread of its own.

    Args:
        access: the server.
        kind: which objects.
        told: called after each change, from the thread.
        waits: (first, longest) seconds between tries after an error.
    """

    def __init__(
        self,
        access: Access,
        kind: Kind,
        told: Callable[[], None],
        waits: tuple[float, float] = (FIRST_WAIT, LONGEST_WAIT),
    ) -> None:
        self._access, self._told = access, told
        self._path, self._selector, slim = kind
        self._slim, self._waits, self._wait = slim, waits, waits[0]
        self._version = ""
        self._lock = threading.Lock()
        self._objects: dict[str, Object] = {}
        self._connection: http.client.HTTPSConnection | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch {self._path}", daemon=True)
        self.synced = False
        """It has listed at least once."""
        self.connected = False
        self.lists = self.watches = self.errors = 0
        self.last_error = ""
        self.heard = 0.0
        """When it last was in touch (monotonic seconds)."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def once(self) -> None:
        """List, and no more.

        Raises:
            UnderpassError: the server does not answer as it should.
        """
        try:
            with self._connected() as connection:
                self._list(connection)
        except (OSError, http.client.HTTPException, ValueError, Gone) as error:
            step = "see that it is reached from here"
            raise UnderpassError("list", self._path, str(error) or repr(error), step) from None

    def close(self) -> None:
        """End the connection and the thread."""
        self._stop.set()
        with self._lock:
            if self._connection and self._connection.sock:
                with contextlib.suppress(OSError):
                    self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(_ANSWER)

    def objects(self) -> list[Object]:
        """What is known, also while the server is away."""
        with self._lock:
            return list(self._objects.values())

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                with self._connected() as connection:
                    if not self._version:
                        self._list(connection)
                    self._follow(connection)
            except Gone:
                self._version = ""
                self._rest()
            except Exception as error:  # noqa: BLE001 - whatever a server says, the watch goes on
                if isinstance(error, ValueError):
                    self._version = ""  # garbage: what is known may be, too
                self._failed(error)
                self._rest()
            else:
                if time.monotonic() - began < self._waits[0]:  # it ends each watch at once
                    self._stop.wait(self._waits[0])

    def _rest(self) -> None:
        """Wait before the next try, longer each time until something has been heard again."""
        self._stop.wait(self._wait * random.uniform(0.5, 1.0))
        self._wait = min(self._wait * 2, self._waits[1])

    def _failed(self, error: Exception) -> None:
        if not self._stop.is_set():
            self.errors += 1
            self.last_error = str(error) or type(error).__name__

    @contextlib.contextmanager
    def _connected(self) -> Iterator[http.client.HTTPSConnection]:
        """A connection that :meth:`close` can end."""
        with self._access.connected(_ANSWER) as connection:
            try:
                _keep_alive(connection.sock)
                with self._lock:
                    self._connection = connection
                if self._stop.is_set():
                    raise OSError("it was told to end")
                yield connection
            finally:
                self.connected = False
                with self._lock:
                    self._connection = None

    def _ask(
        self, connection: http.client.HTTPSConnection, **query: str
    ) -> http.client.HTTPResponse:
        if self._selector:
            query["fieldSelector"] = self._selector
        slim = _METADATA_ONLY.format(list="" if "watch" in query else "List")
        kind = slim if self._slim else "application/json"
        target = f"{self._path}?{urllib.parse.urlencode(query)}"
        response = self._access.ask(connection, target, kind)
        if response.status == _GONE:
            raise Gone
        if response.status != http.client.OK:
            said = response.read(2000).decode(errors="replace")
            with contextlib.suppress(msgspec.MsgspecError):
                said = _ERRORS.decode(said).message or said
            step = "see that its service account may list and watch pods and namespaces"
            cause = f"{response.status} {response.reason}: {said}"
            raise UnderpassError("read", self._path, cause, step)
        return response

    def _list(self, connection: http.client.HTTPSConnection) -> None:
        """Take all objects in place of those that are known."""
        # version 0: out of the server's cache, as the kubelet does it
        response = self._ask(connection, resourceVersion="0")
        data = response.read(_MOST_LIST + 1)
        if len(data) > _MOST_LIST:
            raise ValueError(f"a list of more than {_MOST_LIST} bytes")
        found = _LISTS.decode(data)
        with self._lock:
            self._objects = {_key(one): one for one in found.items or ()}
        self.lists += 1
        self.synced = True
        self._touched()
        self._version = found.metadata.resourceVersion

    def _follow(self, connection: http.client.HTTPSConnection) -> None:
        """Take events until the server ends the watch.

        Raises:
            Gone: it cannot go on from this version.
        """
        response = self._ask(
            connection,
            watch="1",
            resourceVersion=self._version,
            allowWatchBookmarks="true",
            timeoutSeconds=str(WATCH_SECONDS),
        )
        connection.sock.settimeout(_SILENCE)
        self.watches += 1
        self.connected = True
        self.heard = time.monotonic()
        while line := response.readline(_MOST_EVENT + 1):
            if len(line) > _MOST_EVENT:
                raise ValueError(f"an event of more than {_MOST_EVENT} bytes")
            self._take(line)
            self._wait = self._waits[0]

    def _take(self, line: bytes) -> None:
        event = _EVENTS.decode(line)
        if event.type == "ERROR":
            said = _ERRORS.decode(event.object)
            if said.code == _GONE:
                raise Gone
            raise ValueError(f"{said.code} {said.message}")
        found = _OBJECTS.decode(event.object)
        with self._lock:
            if event.type == "DELETED":
                self._objects.pop(_key(found), None)
            elif event.type != "BOOKMARK":
                self._objects[_key(found)] = found
        self.heard = time.monotonic()
        self._version = found.metadata.resourceVersion
        if event.type != "BOOKMARK":
            self._touched()

    def _touched(self) -> None:
        self.heard = time.monotonic()
        self._told()


def _key(found: Object) -> str:
    return f"{found.metadata.namespace}/{found.metadata.name}/{found.metadata.uid}"


def _keep_alive(sock: socket.socket) -> None:
    """Let a server that vanishes be missed within a minute or so."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)


def pods(access: Access, told: Callable[[], None]) -> Watch:
    """A watch of this node's pods."""
    return Watch(access, Kind("/api/v1/pods", f"spec.nodeName={access.node}", False), told)


def namespaces(access: Access, told: Callable[[], None]) -> Watch:
    """A watch of all namespaces' labels."""
    return Watch(access, Kind("/api/v1/namespaces", "", True), told)
