"""Random projections of per-example gradients."""
