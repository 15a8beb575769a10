"""Numbers of an H100 or H200 SXM that the kernels are cut by."""

SMS = 132  # multiprocessors; always read as `hopper.SMS`, for a test may set fewer
SHARED_MEMORY = 232_448  # bytes that one thread block may use
RESERVED = 2560  # of these, for barriers and for what begins at multiples of 1,024
MATRIX_ROWS = 64  # rows of one wgmma
