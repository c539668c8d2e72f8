"""One endpoint plays its steps: blocking in threads, or many in one epoll loop."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass

from underpass.torture.content import Sink, Wrong, WrongBytesError, content, key_file, position
from underpass.torture.plans import FOREVER, Mode, Step

STOP = threading.Event()
"""Set: streams without a length end."""
_READ = 256 << 10
_TURNS = 32
_QUIET_MS = 300
_HUNG_UP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class Count:
    """A number that threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value = 0

    def add(self, number: int) -> None:
        """Add ``number``."""
        with self._lock:
            self.value += number


class _Buffers(threading.local):
    """A read buffer for each thread."""

    def __init__(self) -> None:
        self.bytes = bytearray(_READ)
        self.view = memoryview(self.bytes)


_BUFFERS = _Buffers()
MOVED = Count()
"""Bytes that this process has sent."""


class HungError(Exception):
    """An operation did not finish before its deadline."""


class UnboundedError(Exception):
    """A sender was not held although its reader did not read."""


class EarlyError(Exception):
    """The stream ended, or went on, where it should not."""


@dataclass(frozen=True)
class Outcome:
    """How one endpoint fared."""

    index: int
    side: str
    sent: int
    received: int
    woken: int
    """Blocking reads that returned EAGAIN although time was left; 0 over plain TCP."""
    error: str = ""
    wrong: Wrong | None = None


class Endpoint:
    """The state of one end of a connection: its place in its steps and in both streams."""

    def __init__(
        self, sock: socket.socket, steps: tuple[Step, ...], out: int, into: int, end: float
    ) -> None:
        self.sock = sock
        self.steps = steps
        self.out = out
        self.sink = Sink(into)
        self.sent = 0
        self.woken = 0
        self.began = time.monotonic()
        self.end = end
        self._sizes = random.Random(out)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def write(self, step: Step, left: int) -> int:
        """One write of the step, at most `left` bytes; the number of bytes it took."""
        size = self._sizes.randint(1, step.write) if step.vary else step.write
        size = min(size, left)
        if step.sendfile:
            start = position(self.out, self.sent)
            taken = os.sendfile(self.sock.fileno(), key_file(), start, size)
        else:
            taken = self.sock.send(content(self.out, self.sent, size))
        self.sent += taken
        MOVED.add(taken)
        return taken

    def read(self, left: int) -> int:
        """One read of at most `left` bytes, checked; 0 at EOF."""
        got = self.sock.recv_into(_BUFFERS.view[: min(left, _READ)])
        self.sink.feed(_BUFFERS.bytes, got)
        return got

    def close(self, *, reset: bool = False) -> None:
        """Close the socket, with an RST if asked to."""
        if reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def block(self) -> None:
        """Make calls block in the kernel, as Python's own timeouts do not, to the deadline."""
        self.sock.settimeout(None)
        left = struct.pack("ll", max(1, int(self.end - time.monotonic()) + 1), 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self.sock.setsockopt(socket.SOL_SOCKET, option, left)

    def play_blocking(self) -> None:
        """Play all steps with blocking calls; raises what goes wrong."""
        for number, step in enumerate(self.steps):
            try:
                self._play_blocking(step)
            except BlockingIOError:
                raise HungError(f"blocked too long in step {number}: {step}") from None
        self.close()

    def _play_blocking(self, step: Step) -> None:
        if step.wait:
            time.sleep(step.wait)
        failures: list[Exception] = []

        def send() -> None:
            try:
                self._send_all(step)
            except Exception as error:  # noqa: BLE001 - raised below, in the endpoint's thread
                failures.append(error)
                with contextlib.suppress(OSError):
                    self.sock.shutdown(socket.SHUT_RDWR)

        if step.send and step.receive:
            sender = threading.Thread(target=send)
            sender.start()
            try:
                self._receive_all(step)
            except Exception:
                with contextlib.suppress(OSError):
                    self.sock.shutdown(socket.SHUT_RDWR)
                raise
            finally:
                sender.join()
        else:
            self._send_all(step)
            self._receive_all(step)
        if failures:
            raise failures[0]
        if step.reset:
            self.close(reset=True)

    def _send_all(self, step: Step) -> None:
        if step.until_error:
            self._send_until_error(step)
            return
        if step.fill:
            self._fill(step)
        last = self.sent + step.send
        while not STOP.is_set() if step.send == FOREVER else self.sent < last:
            self.write(step, step.write if step.send == FOREVER else last - self.sent)
            if time.monotonic() > self.end:
                raise HungError(f"still sending at the deadline: {step}")
        if step.shut:
            self.sock.shutdown(socket.SHUT_WR)

    def _fill(self, step: Step) -> None:
        poller = select.poll()
        poller.register(self.sock, select.POLLOUT)
        while time.monotonic() < self.began + step.within:
            try:
                part = content(self.out, self.sent, step.write)
                self.sent += self.sock.send(part, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if not poller.poll(_QUIET_MS):
                    break
            if self.sent > step.fill:
                raise UnboundedError(f"{self.sent} bytes taken that nobody read")

    def _send_until_error(self, step: Step) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() < self.end:
                self.write(step, step.write)
            raise HungError(f"no error from a peer that has closed, {self.sent} bytes sent")

    def _receive_all(self, step: Step) -> None:
        if step.expect_reset:
            self._receive_reset()
            return
        last = self.sink.offset + step.receive
        while step.receive == FOREVER or self.sink.offset < last:
            got = self._wait_read(_READ if step.receive == FOREVER else last - self.sink.offset)
            if not got and step.receive == FOREVER:
                return
            if not got:
                raise EarlyError(f"EOF at offset {self.sink.offset} of {last}")
        if step.eof and self._wait_read(_READ):
            raise EarlyError(f"more than the {last} bytes that were sent")

    def _wait_read(self, left: int) -> int:
        """One blocking read. A reader in a sockmap that is woken for nothing gets EAGAIN."""
        while True:
            try:
                return self.read(left)
            except BlockingIOError:
                if time.monotonic() > self.end:
                    raise
                self.woken += 1

    def _receive_reset(self) -> None:
        with contextlib.suppress(ConnectionResetError):
            while self._wait_read(_READ):
                pass
            raise EarlyError("EOF instead of a reset")


class Machine:
    """An endpoint that plays its steps without ever blocking."""

    def __init__(self, endpoint: Endpoint, index: int, mode: Mode) -> None:
        self.endpoint = endpoint
        self.index = index
        self.edge = mode is not Mode.LEVEL
        self.short = mode is Mode.SHORT
        self.done = False
        self._drained = self._hung_up = False
        self.step = 0
        self._shut = self._refused = False
        self.starts = 0.0
        """When the step begins: `time.monotonic`."""
        self.begun = False
        """Whether it was looked at since."""
        self._until_sent = self._until_received = 0
        self._begin()

    def _begin(self) -> None:
        step = self.endpoint.steps[self.step]
        self._until_sent = self.endpoint.sent + step.send
        self._until_received = self.endpoint.sink.offset + step.receive
        self._shut = self._refused = False
        self.starts, self.begun = time.monotonic() + step.wait, False
        self._over = not (step.eof or step.expect_reset or step.receive == FOREVER)

    @property
    def waits(self) -> bool:
        """Whether its step has not begun yet."""
        return time.monotonic() < self.starts

    @property
    def interest(self) -> int:
        """The epoll events this machine wants to hear of."""
        if self.edge:
            return select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
        wants = select.EPOLLOUT if self._sending() else 0
        return wants | (select.EPOLLIN if self._receiving() else 0)

    def close(self) -> None:
        """Close the socket as the last step says."""
        self.endpoint.close(reset=self.endpoint.steps[self.step].reset)

    def _sending(self) -> bool:
        step = self.endpoint.steps[self.step]
        if step.until_error:
            return not self._refused
        if step.send == FOREVER:
            return not STOP.is_set()
        return self.endpoint.sent < self._until_sent

    def _receiving(self) -> bool:
        step = self.endpoint.steps[self.step]
        return not self._over or (
            step.receive != FOREVER and self.endpoint.sink.offset < self._until_received
        )

    def hear(self, events: int) -> None:
        """Note what epoll told: only that opens an edge-triggered reader's eyes again."""
        if events & (select.EPOLLIN | _HUNG_UP):
            self._drained = False
        if events & _HUNG_UP:
            self._hung_up = True

    def advance(self) -> bool:
        """Do what can be done now; whether it only stopped to let others run."""
        turns = _TURNS if self.edge else 1
        for _ in range(turns):
            if self.waits:
                return False
            self.begun = True
            moved = self._send() | self._receive()
            while self._finish_step():
                if self.done:
                    return False
                moved = True
            if not moved:
                return False
        return self.edge

    def _send(self) -> bool:
        if not self._sending():
            return False
        step = self.endpoint.steps[self.step]
        left = step.write
        if step.send != FOREVER and not step.until_error:
            left = self._until_sent - self.endpoint.sent
        try:
            self.endpoint.write(step, left)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            if not step.until_error:
                raise
            self._refused = True
        return True

    def _receive(self) -> bool:
        if not self._receiving() or self._drained:
            return False
        step = self.endpoint.steps[self.step]
        left = self._until_received - self.endpoint.sink.offset
        ending = step.expect_reset or step.receive == FOREVER or left <= 0
        size = _READ if ending else min(left, _READ)
        try:
            got = self.endpoint.read(size)
            # as epoll(7) allows and nginx does, unless EOF was told with the bytes
            self._drained = self.short and 0 < got < size and not self._hung_up
        except BlockingIOError:
            return False
        except ConnectionResetError:
            if not step.expect_reset:
                raise
            self._over = True
            return True
        if got and ending and not (step.expect_reset or step.receive == FOREVER):
            raise EarlyError(f"more than the {self._until_received} bytes that were sent")
        if not got and (step.expect_reset or not ending):
            where = f"offset {self.endpoint.sink.offset} of {self._until_received}"
            raise EarlyError(f"EOF at {where}")
        if not got:
            self._over = True
        return True

    def _finish_step(self) -> bool:
        step = self.endpoint.steps[self.step]
        if not self._sending() and step.shut and not self._shut:
            self._shut = True
            self.endpoint.sock.shutdown(socket.SHUT_WR)
        if self._sending() or self._receiving():
            return False
        last = self.step + 1 == len(self.endpoint.steps)
        if step.reset or last:
            self.done = True
        else:
            self.step += 1
            self._begin()
        return True


class Loop:
    """Machines that share one epoll instance and one thread."""

    def __init__(self, side: str, expected: int, end: float) -> None:
        self.side = side
        self.expected = expected
        self.end = end
        self.outcomes: list[Outcome] = []
        self._epoll = select.epoll()
        self._machines: dict[int, Machine] = {}
        self._interests: dict[int, int] = {}
        self._waiting: set[int] = set()

    def add(self, machine: Machine) -> None:
        """Take a machine whose socket is connected or connecting."""
        machine.endpoint.sock.setblocking(False)
        number = machine.endpoint.sock.fileno()
        self._machines[number] = machine
        self._interests[number] = machine.interest
        self._epoll.register(number, machine.interest)
        self._waiting.add(number)  # behind it: who begins is no more to be registered

    def run(self) -> None:
        """Play until all expected machines are done or the deadline is over."""
        ready: set[int] = set()
        while len(self.outcomes) < self.expected and time.monotonic() < self.end:
            events = self._epoll.poll(0 if ready else 0.05)
            for number, told in events:
                if machine := self._machines.get(number):
                    machine.hear(told)
            numbers = ready.union(number for number, _ in events)
            if STOP.is_set():
                numbers.update(list(self._machines))
            numbers.update(self._begun())
            ready = {number for number in numbers if self._turn(number)}
        for machine in self._machines.values():
            step = machine.endpoint.steps[machine.step]
            self._end(machine, HungError(f"not done in step {machine.step}: {step}"))

    def _begun(self) -> list[int]:
        """Sockets whose machine has waited long enough."""
        begun = [
            number
            for number in list(self._waiting)
            if (machine := self._machines.get(number)) is None or not machine.waits
        ]
        self._waiting.difference_update(begun)
        return begun

    def _turn(self, number: int) -> bool:
        machine = self._machines.get(number)
        if machine is None:
            return False
        try:
            again = machine.advance()
        except Exception as error:  # noqa: BLE001 - becomes the connection's outcome
            del self._machines[number]
            self._end(machine, error)
            machine.endpoint.close(reset=True)
            return False
        if machine.done:
            # forgotten before it is closed: another thread may get the number at once
            del self._machines[number]
            machine.close()
            self._end(machine, None)
            return False
        if not machine.begun:  # it waits, or did when it was asked
            self._waiting.add(number)
        if machine.interest != self._interests[number]:
            self._interests[number] = machine.interest
            self._epoll.modify(number, machine.interest)
        return again

    def _end(self, machine: Machine, error: Exception | None) -> None:
        self.outcomes.append(outcome(machine.endpoint, machine.index, self.side, error))


def outcome(endpoint: Endpoint, index: int, side: str, error: Exception | None) -> Outcome:
    """What to report of an endpoint that ended with `error` or well."""
    wrong = error.wrong if isinstance(error, WrongBytesError) else None
    text = "" if error is None else f"{type(error).__name__}: {error}"
    received = endpoint.sink.offset
    return Outcome(index, side, endpoint.sent, received, endpoint.woken, text, wrong)


def play(endpoint: Endpoint, index: int, side: str, target: tuple[str, int] | None) -> Outcome:
    """Play an endpoint, connecting it to `target` first, with blocking calls to its end."""
    try:
        endpoint.block()
        if target is not None:
            endpoint.sock.connect(target)
        endpoint.play_blocking()
    except Exception as error:  # noqa: BLE001 - becomes the connection's outcome
        with contextlib.suppress(OSError):
            endpoint.close(reset=True)
        return outcome(endpoint, index, side, error)
    return outcome(endpoint, index, side, None)
