"""From embeddings and predictions to numbers, pictures and the report."""
