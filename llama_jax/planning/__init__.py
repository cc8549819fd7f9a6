"""Whether and how a model fits devices, answered without them."""
