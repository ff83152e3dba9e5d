"""The loops, and what surrounds them."""
