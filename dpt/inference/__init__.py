"""From a picture to its prediction, and to files."""
