"""Training: the loop and the small pieces beside it."""
