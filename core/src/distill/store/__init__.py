"""What teachers gave, kept on disk."""
