"""One progress bar for all long work."""

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm


def bar(iterable: Iterable | None = None, **options) -> tqdm:
    """Text progress bar on standard error, silent where the environment says ``FSP_PROGRESS=0``.

    The text bar, not the widget: it shows in a terminal, in JupyterLab and in papermill's stream alike.

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
    disable = os.environ.get("FSP_PROGRESS") == "0"
    return tqdm(iterable, file=sys.stderr, disable=disable, dynamic_ncols=True, **options)
