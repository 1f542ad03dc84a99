"""From a configuration to records: plan, train, ask every estimator, write."""
