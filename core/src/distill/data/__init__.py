"""Data set to Batch."""
