"""What a GPU says about this package: checks, times of operations and training steps, losses raced to."""
