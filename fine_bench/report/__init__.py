"""One page to look at: ``fine-bench report`` writes ``results/report.html``.

Made from records, scores, ground truths and data sets on the disk; nothing is trained and nothing
is fetched. The page holds its style, its script and its images, so it opens from the disk, and the
same records give the same bytes. What a record says is escaped; the page forbids itself every
request and every script but its own (Content Security Policy).

- ``markup``: escaping, tags, numbers.
- ``boards``: the tables, sortable, with intervals and ties.
- ``gallery``: the examples with the largest scores, and what is known of each.
- ``pictures``: the examples' images, where the data set is at hand.
- ``plates``: figures inside the page.
- ``page``: all of it put together.
"""
