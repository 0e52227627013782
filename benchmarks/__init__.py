"""Speed and memory of the attention mechanisms and of whole training steps, beside public implementations."""
