"""What is kept: records, scores, comparisons, checked when they are read."""
