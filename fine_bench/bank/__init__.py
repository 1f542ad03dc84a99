"""The retraining bank: many models on random subsets, the ground truth of training-data influence."""
