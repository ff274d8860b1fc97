"""Machinery that turns a form's choices into code; it knows tensors and index expressions, no form and no graph."""
