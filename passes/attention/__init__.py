"""Softmax attention in a graph: from its softmax to operands, scores and mask."""
