"""Serving: many requests at once, each with the answer that it gets alone."""
