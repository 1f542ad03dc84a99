"""What records, scores and ground truths show: figures, a page, and the tables of single commands.

Nothing is trained, and nothing is fetched.

- ``figures``: one file a kind of figure, from arrays to a drawing, and ``collection``, which says
  what of a results folder goes into which (``fine-bench figures``).
- ``html``: the self-contained page (``fine-bench report``).
- ``review``: the page on which a person decides about suspicious rows (``fine-bench clean``).
- ``audit``: what could be told about a subset, and how sure that is (``fine-bench audit``).
- ``score_files``: anybody's scores against a ground truth (``fine-bench score``).
- ``cure``: tables and figure of the cure experiment (``fine-bench cure``).
- ``bank_evidence``: what a bank shows beyond its ground truth (``fine-bench truth --evidence``).
"""
