"""The seam between the models and the kernels, alone in importing `dpt.kernels`.

The fast forms are `modules`, when a module may take one is in `rules`, and `acceleration` puts a model on them.
"""
