"""The science: space-time transformers and their scores, in PyTorch alone."""
