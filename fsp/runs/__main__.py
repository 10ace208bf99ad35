"""``python -m fsp.runs``: see `fsp.runs.housekeeping`."""

import sys

from fsp.runs.housekeeping import main

sys.exit(main())
