"""Shocks: the standardised, dependent part of the returns of all assets in one step. One file per model."""
