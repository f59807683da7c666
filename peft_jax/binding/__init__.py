"""How a method enters a model's forward pass; the model is not changed."""
