"""Text for training: the corpus at hand, packing, conversations."""
