"""How much a method's numbers move over a range of options that was declared beforehand.

``conf/sensitivity/<row>.yaml`` declares, for a row of the leaderboard, values of a few of its
options. ``'sensitivity=[fine,trak]'`` runs them as cells of their own beside the row, and a band
from the lowest to the highest mean stands beside the row's own value in the report and in
``sensitivity.md``. Nothing is selected: the leaderboard shows the row with its own options and
nothing else, and no table says which configuration stands at an end of a band.

- ``grid``: from declared values to configurations.
- ``bands``: from records to bands.
- ``view``: tables of them.
"""
