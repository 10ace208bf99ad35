"""Full-spectrum pruning: prune at initialisation, measure the mask as a graph, train what is left.

==============  ==================================================================================
`masks`         mask algebra: prunable weights, exact counts, holding a model to its masks, files
`allocate`      density per layer: uniform, ER, ERK, IGQ, balanced, pyramidal, smart-ratio
`scores`        what a weight is worth: magnitude, SNIP, FORCE, GraSP, SynFlow, Taylor
`phew`          masks from biased random walks; `walkgraph`: the graph they walk on
`gradients`     how scoring runs a model and leaves it as it was
`prune`         `METHODS` and ``prune(model, method, density)``: score, rounds, exact masks
`lottery`       iterative magnitude pruning with rewinding
`diagnose`      what masks leave of a network: empty layers, complete paths, multiply-adds
`spectrum`      the papers' graph quantities: gaps, IMDB, IMSG, NaRC, the full-spectrum coordinate
`dynamic`       dynamic sparse training: SET, RigL, ITOP, and growth guided by a criterion
`tickets`       the masks that dynamic training passes through, with their weights
`search`        many masks of one method, and the layers with the longest coordinates
`train`         one visible training loop; `checkpoint`: how it resumes
`data`          data sets as tensors on the device
`batches`       crop and flip, epochs, examples to score on
`models`        MLPs, CIFAR ResNets, VGGs and their initialisers
`parameters`    checks on what a notebook is given
`runs`          resumable sweeps, in this process or on a cluster; ``python -m fsp.runs``
`tables`        result tables as CSV
`provenance`    what a result was made with
`stats`         intervals, rank correlations, paired comparisons, verdicts on claims
`plot`          one style for every figure
`reproduce`     ``python -m fsp.compendium.reproduce``: every notebook, then the report on the claims
`execute`       one notebook in its own process
`report`        that report, and the comparison with the committed results
`committed`     test and renew the committed notebooks
`paths`         where things lie
`progress`      the progress bar
==============  ==================================================================================
"""

__version__ = "0.1.0"
