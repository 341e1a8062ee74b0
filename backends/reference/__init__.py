"""The reference backend: interprets the graph, needs no compiler."""
