"""What makes a line of the core fast, or exact to the bit. A file is opened for one question; none of them knows the tensor.

rounding     how bitsandbytes rounds: scales, ties, NaN, the nearest code, the mean of the constants
dequantize   code[q] · absmax by tables of pairs and quadruples
vectorwise   int8 with one scale a row, as bitsandbytes rounds it: products of whole numbers, and outlier columns apart
attention    attention on blocks of queries, which never look at the keys after them
scatter      the gradient of a table look-up
pools        where the pages of a Pager live: host memory, a file, CUDA managed memory
copies       memory that a device reaches by itself, and blocks that the allocator keeps
"""
