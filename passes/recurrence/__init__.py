"""Linear recurrences in a graph: operators, loops, chunked products, short convolutions."""
