"""Batch to losses; no optimizer, no files, no ranks."""
