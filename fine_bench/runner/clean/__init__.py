"""Wrong labels in a user's own data, at an error rate."""
