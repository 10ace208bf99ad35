"""Full-spectrum pruning: prune at initialisation, measure the mask as a graph, train what is left.

==============  ==================================================================================
`masks`         which weights are prunable, exact counts, holding a model to its masks, files
`pruning`       ``prune(model, method, density)``: scores, allocations, random walks, IMP, diagnosis
`spectrum`      the papers' graph quantities: gaps, IMDB, IMSG, NaRC, the full-spectrum coordinate
`search`        many masks of one method, and the layers with the longest coordinates
`training`      one visible training loop, checkpoints, moving masks (SET, RigL, ITOP), tickets
`models`        MLPs, CIFAR ResNets, VGGs and their initialisers
`data`          data sets as tensors on the device, batches, augmentation
`runs`          resumable sweeps, in this process or on a cluster; ``python -m fsp.runs``
`compendium`    what only the notebooks need: shared experiments, statistics, figures, reports;
                ``python -m fsp.compendium.reproduce``
`files`         atomic writing, one format for tensors on disk
`paths`         where things lie
`progress`      the progress bar
==============  ==================================================================================

Each wing's own help lists what it offers, such as ``help(fsp.spectrum)``.
"""

__version__ = "0.1.0"
