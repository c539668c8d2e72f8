"""Listeners in the pods behind a service, and clients that reach one of them through it."""

from __future__ import annotations

from dataclasses import dataclass

from tests.kernel.bed import Bed
from tests.kernel.kube_proxy import TARGET, Service
from tests.kernel.remote import Address, Remote, accept_any, connect, listen
from underpass.torture.worker import Worker

Ends = tuple[Remote, Remote]

CONNECTIONS = 16
"""With two pods behind a service, one of 30,000 runs meets only one of them."""


@dataclass
class Backends:
    """The listeners."""

    listeners: list[Remote]

    def couple(self, client: Worker, to: Address, source: Address | None = None) -> Ends:
        """Connect to the service; whichever pod was chosen accepts."""
        near = connect(client, to, source)
        return near, accept_any(self.listeners)


def backends_of(bed: Bed, service: Service, *, any_address: str = "") -> Backends:
    """Listen in the pods "server" and "other", at the service's endpoints or at `any_address`."""
    where = ("server", "other")
    addresses = [any_address or endpoint for endpoint in service.endpoints]
    pods = zip(where, addresses, strict=True)
    return Backends([listen(bed.worker(at), (address, TARGET)) for at, address in pods])


def served_by(ends: list[Ends]) -> set[str]:
    """The namespaces of the pods that got the connections."""
    return {far.worker.place.netns for _, far in ends}


def check_spread(service: Service, ends: list[Ends]) -> None:
    """Every pod behind the service got some of the connections."""
    assert len(served_by(ends)) == len(service.endpoints)
