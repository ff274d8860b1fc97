"""How long a form takes on a device, from closed formulas; it knows no form and no graph."""
