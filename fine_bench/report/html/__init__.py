"""One page to look at, made from records alone."""
