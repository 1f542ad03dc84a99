"""Figures from records and scores alone; nothing is trained. ``fine-bench figures``.

- ``collection``: from a results folder to all of its figures; ``tables``: a table with its records
  and scores, read when they are needed; ``requirements``: what a figure needs of a table;
  ``output``: into files.
- ``style``: one look for all figures, and how they become bytes: the same figure, the same bytes.
- ``labels``: names beside the points of a scatter plot, without overlaps.
- ``benchmark``: detection against consistency, recall curves.
- ``runs``: losses, ranks and consistency over seeds (the paper's Figures 1 and 2).
- ``randomness``: consistency of runs that differ in initialisation, in order, in both.
- ``theory``: trade-off functions, their composition, P and Q samples (Figures 3 to 5).
- ``samples``, ``tradeoff``: the stored P and Q samples of a run, and their trade-off curves.
- ``agreement``: the paper's estimator against the all-example one, example by example.
- ``fidelity``, ``costs``: agreement with retraining beside its ceiling, and beside its cost.
- ``option_ranges``: numbers over preset ranges of options.
- ``retraining``: error curves of a bank, and influence by its definition.

The functions that draw take plain arrays and return a ``Figure``.
"""
