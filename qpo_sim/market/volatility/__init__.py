"""Volatility models: how the scale of each asset's return moves from step to step. One file per model."""
