"""Numbers of an H100 or H200 SXM that the kernels are cut by.

Cards with fewer multiprocessors (H100 PCIe 114, H20 78) run them too, but persistent kernels then in two rounds.
"""

SMS = 132  # multiprocessors; always read as `hopper.SMS`, for a test may set fewer
SHARED_MEMORY = 232_448  # bytes that one thread block may use
RESERVED = 2560  # of these, for barriers and for what begins at multiples of 1,024
MATRIX_ROWS = 64  # rows of one wgmma
