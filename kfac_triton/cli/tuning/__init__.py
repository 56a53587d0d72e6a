"""`kfac-triton doctor` and `kfac-triton tune`: kernels checked against float64, and timed."""
