"""`python -m deploy` is the command `slimdiff`."""

import sys

from deploy.cli.app import main

sys.exit(main())
