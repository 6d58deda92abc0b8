"""Folders of pictures with depth or labels, and what a training sees of them."""
