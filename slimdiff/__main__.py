"""`python -m slimdiff` is the command `slimdiff`, and `torchrun -m slimdiff` the same in several processes.

`-m` puts the working directory first on the import path. A folder of its own called `deploy` or `exporters` would be
taken for ours, so the directory is taken off the path, unless it is the one that we lie in. A folder called `slimdiff`
is taken before anything of ours runs: there, call the installed command.
"""

import os
import sys

_here, _root = os.path.realpath(os.getcwd()), os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _here != _root:
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or ".") != _here]

if __name__ == "__main__":
    from importlib import import_module

    # By name: the packages know those below them, and this is only another name of the command.
    sys.exit(import_module("deploy.cli.app").main())
