"""Generation: sampling, decoding, and the text functions around them."""
