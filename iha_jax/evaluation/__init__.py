"""What a trained model is worth: validation loss, bits per byte, sampled text."""
