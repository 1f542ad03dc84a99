"""One page to look at: ``fine-bench report`` writes ``results/report.html``.

Made from records, scores, ground truths and data sets on the disk. The page holds its style, its
script and its images, so it opens from the disk, and the same records give the same bytes. What a
record says is escaped; the page forbids itself every request and every script but its own (Content
Security Policy).

- ``build``: from a results folder to the page, one step after the other.
- ``page``: all of it put together; ``markup``: escaping, tags, numbers.
- ``tables``, ``sensitivity``: the tables, sortable, with intervals and ties.
- ``figures``: figures inside the page.
- ``gallery``, ``examples``: the examples with the largest scores, what is known of each, and their
  HTML; ``images``: their images and texts, where the data set is at hand.
"""
