"""Feed-forwards in a graph: two products with weights and a nonlinear function between them."""
