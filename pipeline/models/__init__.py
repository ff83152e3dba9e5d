"""Networks and their slowly moving parts, by name."""
