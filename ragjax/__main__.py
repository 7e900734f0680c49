"""`ragjax`, and `python -m ragjax`. Nothing else is imported before it is known what Ctrl-C does."""

import sys

from ragjax.signals import guarded, leave_at_once


def main() -> int:
    end_with = leave_at_once()

    def command() -> int:
        from ragjax.cli import main

        return main()

    return end_with(guarded(command))


if __name__ == "__main__":
    sys.exit(main())
