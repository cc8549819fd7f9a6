"""The model: layers, caches, leaf types of weights, and how they are initialized."""
