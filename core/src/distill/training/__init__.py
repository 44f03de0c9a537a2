"""A stage's description to trained weights."""
