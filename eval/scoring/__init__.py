"""How good a model is: losses, answers and choices, with bounds."""
