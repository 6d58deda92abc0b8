"""The renderer of the carried models' data: scenes with exact depth and labels."""
