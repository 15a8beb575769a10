from pallas_kernels.matvec.api import FEW_ROWS, dot_columns, dot_rows

__all__ = ["FEW_ROWS", "dot_columns", "dot_rows"]
