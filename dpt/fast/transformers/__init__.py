"""transformers' own modules on the kernels: `table` says which, `encoder` and `decoder` how, `reading` what their children must be.

transformers itself is imported by none of these until a model of it is given.
"""
