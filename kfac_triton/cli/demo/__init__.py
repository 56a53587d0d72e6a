"""`kfac-triton demo`: an autoencoder of handwritten digits, trained by K-FAC, Adam and SGD."""
