"""Where arrays live: the mesh and the placement of batches and state on it."""
