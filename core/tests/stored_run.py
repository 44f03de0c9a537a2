"""Runs the experiment of test_stored_stage.py in one of several processes."""

import sys
from pathlib import Path

from test_stored_stage import EXACT, described, run

folder = Path(sys.argv[1])
run(described(folder, EXACT))
