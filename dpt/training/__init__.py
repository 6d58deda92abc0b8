"""Training: recipes, losses, runs."""
