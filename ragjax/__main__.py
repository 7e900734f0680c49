"""`ragjax`, and `python -m ragjax`. Nothing else is imported before it is known what Ctrl-C does."""

import sys

from ragjax.signals import guarded, leave_at_once


def main() -> int:
    leave_at_once()

    def command() -> int:
        from ragjax.cli import main

        return main()

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
