"""`python -m opensloth.launch RUN_DIR`."""

import sys

from opensloth.launch.launcher import main

if __name__ == "__main__":
    sys.exit(main())
