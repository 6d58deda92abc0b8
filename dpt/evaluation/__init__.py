"""Metrics, the alignment of relative depth, and scoring a model on a folder."""
