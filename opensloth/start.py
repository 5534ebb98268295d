"""`python -m opensloth.start MODULE`: a module's `main`, whose imports are not searched for garbage.

What trains imports thousands of modules, which stay. Looking through all of them again and again took a quarter of the
time, and once more at the exit.
"""

from __future__ import annotations

import gc
import importlib
import sys


def main() -> int:
    gc.disable()
    module = importlib.import_module(sys.argv[1])
    gc.freeze()
    gc.enable()
    return int(module.main())


if __name__ == "__main__":
    sys.exit(main())
