"""What several ops are made of; no op itself. Parts know the launch, and no op."""
