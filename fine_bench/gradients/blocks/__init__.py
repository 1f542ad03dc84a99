"""Per-example gradients of one layer, one file a kind of layer."""
