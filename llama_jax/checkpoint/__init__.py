"""Model folders: weights read lazily, written atomically."""
