"""What training costs, predicted beside measured.

memory       the bytes of a training step
paging       what a paged optimizer costs against its budget
flops        floating-point operations, counted in the engine
communication   what machines that train together send, and how long that takes
parameters   how many numbers LoRA and its rivals train
methods      what each way of fine-tuning costs beside what it reaches: training.compare's reports as a table
tables       numbers in units, and aligned columns
"""
