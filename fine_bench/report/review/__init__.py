"""The page on which a person decides about suspicious rows: ``fine-bench clean`` writes it.

One file that opens from the disk and asks the network for nothing. Decisions are kept in the
browser and saved as a csv, which ``fine-bench clean --decisions`` reads.

- ``page``: the file put together. ``review.js`` is its script, ``review.css`` its style.
- ``content``: the table checked, and as compact JSON.
- ``thumbnails``: what the rows look like, as many as fit into the page.
"""
