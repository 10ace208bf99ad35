"""What long work shows: one progress bar, and command lines whose output may go anywhere."""

import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

from tqdm import tqdm

LINE_S = 10  # into a file: seconds between two lines, of whatever bars
READER_GONE = 141  # exit status of a command that writes to nobody, as a shell gives it


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


def command_line(main: Callable[[], int | None]) -> NoReturn:
    """End the process with the exit status of a command line, wherever its output goes.

    A character that a stream cannot encode is written as an escape.  Where the reader of the output has stopped
    reading, as ``head`` does, the command ends without a word, with the exit status 141.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # what replaces a stream has it, too
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():  # it was another pipe
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # for what Python still writes when it ends
        status = READER_GONE
    sys.exit(status)


def _reader_has_gone() -> bool:
    """Whether nobody reads this process's standard output any more."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


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
