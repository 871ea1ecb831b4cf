"""How fast this installation is, as ratios that a slower machine leaves alone: `ratios` times the `workload`."""
