"""``python -m fsp.runs``: see `fsp.runs.housekeeping`."""

from fsp.progress import command_line
from fsp.runs.housekeeping import main

command_line(main)
