"""Exact expectations of quantized weights. Nothing here knows the tensor.

distributions   normal, Student's t, mixtures, outliers: densities and tails
solved          the codes that are solved for, as `codebooks` hands them on
optimality      what a code costs in expectation, and the codes that cost least
"""
