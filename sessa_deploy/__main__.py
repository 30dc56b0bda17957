"""`python -m sessa_deploy`: the command line where its script is not on PATH."""

import os
import sys

# `python -m` puts the working directory first, where a user's random.py may lie; only a clone that is run from its own folder is wanted there.
if sys.path and sys.path[0] == os.getcwd() and os.path.realpath(os.getcwd()) != os.path.dirname(os.path.dirname(os.path.realpath(__file__))):
    del sys.path[0]

from sessa_deploy.cli import main

if __name__ == "__main__":
    main()
