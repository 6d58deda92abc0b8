"""What the ops compute on a CPU faster than by PyTorch's own layers, with PyTorch's own products: no Triton, and nothing is compiled.

winograd      a 3x3 convolution in a quarter of the products
convolution   the ops' convolutions, by the way that the table of this machine has for their form
choices       that table
linear        a linear layer and what follows it
memory        buffers that are used again
plain         when an op may go these ways
"""
