"""Video in, frames, tables, splits and training samples out; no networks here."""
