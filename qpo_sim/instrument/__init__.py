"""What an account can hold, one file per kind: how it is margined, liquidated and settled, one step at a time.

Every account module offers the same functions, which the ledger calls for each account of its kind:

- `margin_init(account, shape, one, options) -> (state, latch)` and
  `margin_step(context, t, account, shape, state, prices, scale, options) -> (state, latch)`: the account as if it were
  never liquidated, its distance to liquidation and the probability of crossing during the step;
- `left(context, t, account, shape, latch, options) -> rows`: what a first liquidation in this step leaves;
- `drawn_init(account, shape, one, options) -> state` and
  `drawn_step(context, t, account, shape, state, latch, uniform, options) -> state`: the branch with one drawn outcome;
- `close_survival(context, account, shape, margin_state, survival, prices) -> (survived, liquidated)`: terminal values;
- `profit_and_loss(account, state) -> ProfitAndLoss`: where the drawn branch's money went.
"""
