"""Tools of the kernels' authors: compiling, tuning, judging. No op imports them, and the installed package does not hold them."""
