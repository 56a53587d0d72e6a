"""Which Fisher matrix: the likelihood that a loss defines, and the scales that turn sums into expectations."""
