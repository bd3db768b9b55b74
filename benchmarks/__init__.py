"""Benchmarks: depgraph and its peers side by side on real architectures with random weights.

What they share with the tests (networks, ways out, torchvision's operators) lies in `tests/`, which is importable from here on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
