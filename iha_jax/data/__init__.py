"""Text to rows of tokens: TFDS sources, tokenizers, packing, and batches whose order is a function of seed and step."""
