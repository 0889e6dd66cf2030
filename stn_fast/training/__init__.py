"""The trainer: configuration, methods, the loop, checkpoints. Import what you need from its modules."""
