"""What moves the parameters: the first-order rule along preconditioned gradients, or the controller of lr="auto"."""
