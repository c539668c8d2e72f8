"""What the command `underpass` and `python -m underpass` start."""

from __future__ import annotations

import signal


def main() -> None:
    """The command line; until that is loaded, Ctrl-C ends the process without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from underpass.cli import main as run  # noqa: PLC0415 - not before Ctrl-C is seen to

    run()


if __name__ == "__main__":
    main()
