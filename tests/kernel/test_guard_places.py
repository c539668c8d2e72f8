"""Whose verdict counts where several listen at one place, or one takes what is for another."""

from __future__ import annotations

from tests.kernel import remote
from tests.kernel import test_guard as guard
from tests.kernel.bed import SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.interfaces import SECOND, second_interface
from tests.kernel.remote import Remote, connect, listen
from tests.kernel.test_routes import bound_to
from tests.kernel.test_tproxy import PROXY, transparent_listener
from tests.kernel.waiting import wait_until
from underpass.torture.worker import Worker

TO = guard.TO
ANY = ("0.0.0.0", 8085)


def _waits(listener: Remote) -> bool:
    """Whether a connection waits to be accepted."""
    return listener.worker.call(remote._waiting, listener.number)


def _right(near: Remote, listener: Remote) -> None:
    """The first bytes of a connection come by TCP: its program was never met, and splices."""
    near.send(1, guard.MESSAGE)
    far = listener.accept()
    taken = far.worker.submit(guard._splice, far.number, guard.MESSAGE)
    assert taken.result(20) == guard.MESSAGE


def _intercept(bed: Bed, port: int) -> None:
    to = (
        f"-A PREROUTING -i eth0 -p tcp --dport {port} -j TPROXY --on-port {PROXY} --tproxy-mark 1/1"
    )
    bed.within("server", "iptables", "-t", "mangle", *to.split())
    for words in (
        "rule add fwmark 1 lookup 100",
        "route add local default dev lo table 100",
    ):
        bed.within("server", "ip", *words.split())


def test_a_transparent_proxy_is_judged_itself(bed: Bed, plane: MakePlane) -> None:
    """Claim: an admitted application at the port does not admit the proxy in its place."""
    client, app = guard._admit(plane(guard.SOON, watch=True), bed)
    listen(app, TO)
    proxy = transparent_listener(bed.worker("server"))
    _intercept(bed, TO[1])
    _right(connect(client, TO), proxy)


def test_two_programs_listen_on_two_devices(bed: Bed, plane: MakePlane) -> None:
    """Claim: the one's verdict does not admit the other, though both listen at one place."""
    second_interface(bed, "veth")
    underpass = plane(guard.SOON, watch=True)
    client, admitted = guard._admit(underpass, bed)
    own = listen(admitted, ANY, options=bound_to("eth0"))
    other = listen(bed.worker("server"), ANY, options=bound_to("eth1"))
    connect(client, (SERVER4, ANY[1]))
    own.accept()
    _right(connect(client, (SECOND["server"], ANY[1])), other)


def _first_of_another(client: Worker, own: Remote, other: Remote) -> Remote | None:
    """A connection that the kernel gave to `other` after `own` has accepted one, or None."""
    for accepted in range(64):
        near = connect(client, (SERVER4, ANY[1]))
        wait_until(lambda: _waits(own) or _waits(other), "it is there")
        if _waits(other):
            return near if accepted else None
        own.accept()
    raise AssertionError("the kernel chose one of two listeners 64 times")


def test_two_programs_share_a_port(bed: Bed, plane: MakePlane) -> None:
    """Claim: by SO_REUSEPORT too, who has accepted does not admit the other's first connection."""
    client, admitted = guard._admit(plane(guard.SOON, watch=True), bed)
    stranger = bed.worker("server")
    near = None
    while near is None:
        own = listen(admitted, ANY, reuse_port=True)
        other = listen(stranger, ANY, reuse_port=True)
        near = _first_of_another(client, own, other)
        if near is None:
            own.close()
            other.close()
    _right(near, other)


def test_several_listeners_of_one_program(bed: Bed, plane: MakePlane) -> None:
    """Claim: workers of one admitted program that each listen at the place pair at once."""
    underpass = plane(guard.SOON, watch=True)
    client, admitted = guard._admit(underpass, bed)
    both = [listen(admitted, ANY, reuse_port=True) for _ in range(2)]
    served = set()
    for _ in range(64):
        near = connect(client, (SERVER4, ANY[1]))
        wait_until(lambda: any(map(_waits, both)), "it is there")
        far = next(filter(_waits, both))
        served.add(far.number)
        assert guard._carried(underpass, near, far.accept())
        if len(served) == 2:
            return
    raise AssertionError("the kernel chose one of two listeners 64 times")
