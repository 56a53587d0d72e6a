"""Which Fisher matrix: what a loss says about the outputs, and how sums become expectations."""
