"""Quantities that move with the market: funding, rates, gas, depth, pegs, implied volatility, oracles."""
