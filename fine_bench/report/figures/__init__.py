"""Figures from records and scores alone; nothing is trained. ``fine-bench figures``.

- ``style``: one look for all figures, and how they become bytes: the same figure, the same bytes.
- ``labels``: names beside the points of a scatter plot, without overlaps.
- ``benchmark``: detection against consistency, recall curves.
- ``runs``: losses, ranks and consistency over seeds (the paper's Figures 1 and 2).
- ``theory``: trade-off functions, their composition, P and Q samples (Figures 3 to 5).
- ``agreement``: the paper's estimator against the all-example one, example by example.
- ``shelf``, ``reading``: what of a results folder goes into which figure, and what is missing.

The functions of ``benchmark``, ``runs``, ``theory`` and ``agreement`` take plain arrays and return
a ``Figure``.
"""
