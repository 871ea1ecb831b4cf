"""Shares of automated market makers, one file per curve: what a swap gives, what a share holds and what it is worth.

Every curve offers `swap`, and for a pool that arbitrageurs keep at the external price `holdings` and `value`. The
account needs nothing more: the gradient of `value` in a price is the holding of that coin (the pool minimises the value
of what it holds), and the value along a path of prices carries the whole loss against holding; `fees` gives what
traders pay, `loss_versus_rebalancing` the part that arbitrageurs take, and what of it returns as fees.

Prices are units of the quote coin per unit of the base coin unless a function takes one price per coin. Fees are
decimals of the input (StableSwap: of the output). Everything is elementwise over paths; functions over many coins or
segments have that axis first and the paths last.
"""
