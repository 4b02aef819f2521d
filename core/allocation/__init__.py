"""Allocation: which tensor format every tensor gets, so that the predicted KL is least within a budget of bytes."""
