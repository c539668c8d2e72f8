"""Traffic that checks itself, for a pod: only the standard library, run as ``python -c`` there.

A server echoes. A client holds its connections for as long as it runs, compares every byte that
comes back, and tells once a second how it goes, a JSON object a line. SIGTERM ends it well.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time

SIZES = (1, 100, 1024, 20000, 131072)
stop = threading.Event()
moved = {"messages": 0, "bytes": 0}
wrong: list[str] = []


def serve(port: int) -> None:
    """Echo, a thread a connection."""

    def echo(connection: socket.socket) -> None:
        while data := connection.recv(1 << 16):
            connection.sendall(data)
        connection.close()

    with socket.create_server(("", port), backlog=128) as listener:
        while True:
            threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()


def block(number: int, count: int, size: int) -> bytes:
    """Bytes that only this message of this connection has."""
    seed = hashlib.sha256(f"{number}:{count}".encode()).digest()
    return (seed * (size // 32 + 1))[:size]


def drive(host: str, port: int, number: int, pause: float) -> None:
    """One connection, to the end; what is wrong is told, and ends all."""
    size = SIZES[number % len(SIZES)]
    try:
        with socket.create_connection((host, port), timeout=20) as connection:
            for count in range(1 << 62):
                if stop.wait(pause):
                    return
                # kernels that miscount FIONREAD do not pair what begins with a large message
                sent = block(number, count, size if count >= 5 else 1)
                connection.sendall(sent)
                got = b""
                while len(got) < len(sent):
                    part = connection.recv(len(sent) - len(got))
                    if not part:
                        raise OSError("the server closed it")
                    got += part
                if got != sent:
                    raise OSError(f"wrong bytes in message {count} of {size}")
                moved["messages"] += 1
                moved["bytes"] += len(sent)
    except OSError as error:
        wrong.append(f"connection {number}: {error}")
        stop.set()


def tell(*, end: bool = False) -> None:
    """One line of how it goes."""
    line = {"at": time.time(), "end": end, "wrong": wrong, **moved}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """``serve PORT`` or ``drive HOST PORT CONNECTIONS PAUSE``."""
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if sys.argv[1] == "serve":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        serve(int(sys.argv[2]))
    host, port, count, pause = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
    threads = [
        threading.Thread(target=drive, args=(host, port, number, pause)) for number in range(count)
    ]
    for thread in threads:
        thread.start()
    while not stop.is_set():
        tell()
        stop.wait(0.5)
    for thread in threads:
        thread.join()
    tell(end=True)
    os._exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
