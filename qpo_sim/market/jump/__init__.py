"""Jumps of log-prices: compound Poisson, self-exciting, and marked failures. One file per model."""
