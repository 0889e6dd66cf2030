"""One module per operation: its reference, registration, gradients and choice of backend."""
