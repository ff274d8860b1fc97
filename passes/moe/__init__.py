"""Mixtures of experts in a graph: router, dispatch, experts and combination."""
