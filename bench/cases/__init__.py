"""What is measured: models, training steps, the cumulative gain, the ops, and other people's models."""
