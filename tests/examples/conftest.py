"""Scripts under examples/ import their neighbours by name, as they do when run."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
for folder in ("zoo", "leaderboard"):
    sys.path.insert(0, str(EXAMPLES / folder))
