"""One file per source format: each reads a model into a graph and a weight map, loading no weight."""
