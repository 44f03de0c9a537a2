"""Text to frozen description; imports no torch."""
