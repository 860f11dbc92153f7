"""ladderfast: Ladder-family networks for PyTorch on hand-written kernels."""
