"""One progress bar for all long work."""

import os
import sys
import time
from collections.abc import Iterable

from tqdm import tqdm

LINE_S = 10  # into a file: seconds between two lines, of whatever bars


def bar(iterable: Iterable | None = None, **options) -> tqdm:
    """Progress bar: one at a time in a process, and nothing where the environment says ``FSP_PROGRESS=0``.

    In a terminal it is tqdm's bar; in a notebook a text that is updated in place and gone when the bar ends; into a
    file or pipe a line on standard error, at most one in ten seconds.  A bar that is opened while another one is open
    in this process shows nothing.

    Parameters
    ----------
    iterable : iterable, optional
        What to loop over; without it call ``update`` on the bar.
    **options
        Passed to `tqdm.tqdm` (``total``, ``unit``, ``desc``, ``leave`` ...).

    Returns
    -------
    tqdm.tqdm
    """
    if _in_notebook():
        kind, look = _NotebookBar, {"gui": True, "mininterval": 0.5}
    elif sys.stderr.isatty():
        kind, look = tqdm, {"dynamic_ncols": True}
    else:
        kind, look = _Lines, {"gui": True, "mininterval": LINE_S, "ncols": 0}  # numbers alone
    with tqdm.get_lock():  # of two threads that open a bar at the same time, one sees the bar of the other
        disable = os.environ.get("FSP_PROGRESS") == "0" or len(tqdm._instances) > 0
        opened = kind(iterable, file=sys.stderr, disable=disable, **look, **options)
    opened.refresh()
    return opened


class _NotebookBar(tqdm):
    """Bar in one display of a cell's output; executed notebooks keep nothing of it."""

    shown = None

    def display(self, msg=None, pos=None):
        from IPython.display import display  # a kernel has loaded it; nothing else here needs it

        if self.shown is None:
            self.shown = display(_text(str(self)), raw=True, display_id=True)
        else:
            self.shown.update(_text(str(self)), raw=True)

    def close(self):
        super().close()
        if self.shown is not None:
            self.shown.update(_text(""), raw=True)
            self.shown = None


class _Lines(tqdm):
    """Bar as a plain line now and then."""

    last = time.monotonic()  # when a bar of this process last wrote a line, at first when this module was loaded

    def display(self, msg=None, pos=None):
        if time.monotonic() - _Lines.last >= LINE_S:
            _Lines.last = time.monotonic()
            print(self, file=sys.stderr, flush=True)


def _text(text: str) -> dict[str, str]:
    """Output of a cell that is plain text."""
    return {"text/plain": text}


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
