"""Risk measures: outcomes and weights in, estimates with standard errors out."""
