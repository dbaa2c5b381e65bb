"""Training of draft modules: recipes, samples, target features, losses, the trainer."""
