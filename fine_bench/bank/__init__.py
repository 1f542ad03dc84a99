"""The retraining bank: many models on random subsets, the ground truth of influence."""
