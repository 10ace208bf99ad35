r"""Search for masks with a large full-spectrum norm: the actionable method of the full-spectrum paper, and more.

A pruning method with some randomness draws one mask after another.  Each layer :math:`\ell` of a candidate is compared
with the best layer so far, the incumbent, in its coordinate :math:`v_\ell = (\Delta_r, \lambda, IMDB, IMSG)` and its
norm :math:`S_\ell = \lVert v_\ell \rVert_2`, measured with the model's own weights.  Layers are accepted one by one,
so the result is an assembly of layers from many masks.

`search` does this as published, or with an exact density.  `optimise` spends most of the candidates on masks that it
makes of the incumbent itself.

References
----------
.. [1] Hoang, Kundu, Liu, Wang: Don't just prune by magnitude! Your mask topology is a secret weapon. NeurIPS 2023.
"""

from fsp.search.candidates import RANDOMNESS, matched, mini_batches
from fsp.search.judging import SearchResult
from fsp.search.population import optimise, search
