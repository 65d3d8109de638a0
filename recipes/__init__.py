"""Recipes: wiring of what the package has, to be run by ``tune run torchfuse/recipes/<name>.py``."""
