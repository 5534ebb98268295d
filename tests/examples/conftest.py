"""The quickstart's scripts import one another as plain modules, as they do when they are run."""

import sys
from pathlib import Path

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))
