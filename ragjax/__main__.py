"""`python -m ragjax`."""

import sys

from ragjax.cli import main

sys.exit(main())
