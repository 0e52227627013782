"""What a training step would need on machines that are not here: memory, FLOPs, collectives, time."""
