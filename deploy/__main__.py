"""`python -m deploy` is the command `slimdiff`. `python -m slimdiff` is the same, and says what leaves the import path."""

import os
import sys

_here, _root = os.path.realpath(os.getcwd()), os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _here != _root:
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or ".") != _here]

if __name__ == "__main__":
    from deploy.cli.app import main

    sys.exit(main())
