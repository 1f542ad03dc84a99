"""Tables of what the records say: rebuilt from them alone, seed by seed, and what is missing.

The way of the data, from the records to what is read:

- ``tables``: what a leaderboard consists of; plain data.
- ``build``: which records count, what makes a row, and its numbers. ``consistency`` compares the
  seeds of a row, ``completeness`` names records that lack what they were written with, ``ties``
  marks the rows that cannot be told from the best, ``captions`` finds the words: names of rows,
  descriptions of settings, notes.
- ``sheet``: a printed table between its numbers and its looks, written for a terminal and as
  Markdown here and as HTML by ``report.html.tables``. ``render`` makes them of a leaderboard, and
  its csv and JSON.
- ``summary``: all tasks, a table a kind of task.
- ``option_grid``, ``sensitivity``, ``sensitivity_tables``: how far a row's numbers move over a
  range of its options that was declared beforehand (``conf/sensitivity/<row>.yaml``): the
  configurations of a range, their bands, and how these look. Nothing is selected: the leaderboard
  shows a row with its own options alone, and no table says which configuration stands at an end of
  a band.

Columns, their labels and directions are declared by the metrics (``metrics.registry``).
"""
