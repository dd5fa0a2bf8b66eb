"""The memorization evaluator: how much of the training set comes back out of a model."""
