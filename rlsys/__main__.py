"""`python -m rlsys`."""

import sys

from rlsys.cli import main

sys.exit(main())
