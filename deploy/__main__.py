"""`python -m deploy` is the command `slimdiff`."""

import sys

from deploy.cli import main

sys.exit(main())
