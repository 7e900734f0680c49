"""`ragjax`, and `python -m ragjax`. Nothing else is imported before it is known what Ctrl-C does."""

import _signal  # type: ignore[import-not-found]  # what `signal` wraps, which takes time to import
import os
import sys


def main() -> int:
    """Runs `ragjax`; until its own handlers are there, Ctrl-C and SIGTERM end the process without a traceback."""
    for number in (_signal.SIGINT, _signal.SIGTERM):
        _signal.signal(number, lambda number, frame: os._exit(128 + number))
    from ragjax.signals import guarded, leave_at_once

    end_with = leave_at_once()

    def command() -> int:
        from ragjax.cli import main

        return main()

    return end_with(guarded(command))


if __name__ == "__main__":
    sys.exit(main())
