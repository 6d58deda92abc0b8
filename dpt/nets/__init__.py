"""The networks, in plain PyTorch, under the paper's names: they know nothing of pictures, files or kernels."""
