r"""Spectra of the bipartite graphs behind pruning masks: the full-spectrum coordinate and its parts.

A layer's mask is a bipartite graph: left vertices are the unrolled inputs (one per input channel and kernel
position), right vertices the output channels, an edge is a kept weight.  `B`, shape (n_left, n_right), is its
biadjacency matrix.  The adjacency matrix

.. math:: A = \begin{pmatrix} 0 & B \\ B^\top & 0 \end{pmatrix}

has the eigenvalues :math:`\pm\sigma_i(B)` and zeros, so the "third largest \|eigenvalue\|" that the published
code asks for is :math:`\sigma_2(B)`.  Spectra are float64, or where that is asked right
to 1e-5 and found faster.  What is undefined is ``nan``; only the norm of a coordinate counts it as 0, as published, and
`coverage` says how often that happened.

References
----------
.. [1] Hoang, Kundu, Liu, Wang: Don't just prune by magnitude! Your mask topology is a secret weapon. NeurIPS 2023.
.. [2] Hoang, Liu, Marculescu, Wang: Revisiting pruning at initialization through the lens of Ramanujan graph.
   ICLR 2023.
"""

from fsp.masks import Wiring
from fsp.spectrum.definitions import (
    RULES,
    Rules,
    biadjacency,
    imdb,
    imsg,
    narc,
    ramanujan_gap,
    singular_values,
    weighted_gap,
)
from fsp.spectrum.full_spectrum import (
    Coordinate,
    coordinate,
    coordinates,
    coverage,
    distance,
    layer_mean,
    population,
    spectrum_norm,
)
from fsp.spectrum.table import layer_table
