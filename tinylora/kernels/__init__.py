"""What makes a line of the core fast, or exact to the bit. A file is opened for one question; none of them knows the tensor.

rounding     how bitsandbytes rounds: scales, ties, NaN, the nearest code, the mean of the constants
reciprocal   1/x as a GPU's approximate instruction rounds it
dequantize   code[q] · absmax by tables of pairs and quadruples
eightbit     absmax, and AdamW's m and v, in 8 bits on the host, in buffers that stay in the cache
buffers      memory to compute in, kept from call to call
threads      elementwise work on two cores, where the calling thread has them to itself
pagewise     an optimizer's step over its pages, shared by two threads
vectorwise   int8 with one scale a row, as bitsandbytes rounds it: products of whole numbers, and outlier columns apart
attention    attention on blocks of queries, which never look at the keys after them
products     matrices in bfloat16 and float16: rounded on NumPy, on the tensor cores of a GPU
casts        numbers rounded to two bytes, brought back and added, on a GPU
cuda.cu      what a GPU computes in one launch, each kernel under its equation; cuda starts them
device       which operations and optimizer steps are such kernels where their arrays lie on a GPU
scatter      the gradient of a table look-up
pools        where the pages of a Pager live: host memory, a file, CUDA managed memory
copies       memory that a device reaches by itself, and freed memory that is returned at once or kept
"""
