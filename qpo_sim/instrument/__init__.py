"""What an account can hold, one file per kind: how it is margined, liquidated and settled, one step at a time.

Every account module offers the same functions, which the ledger calls for each account of its kind:

- `margin_init(account, shape, one) -> state` and
  `margin_step(context, t, account, shape, state, prices, scale, options) -> (state, check)`: the account as if it were
  never liquidated, its distance to liquidation and the probability of crossing during the step;
- `left(context, t, account, shape, check, options) -> rows`: what a first liquidation in this step leaves, `N_LEFT`
  rows;
- `drawn_init(account, shape, one, options) -> state` and
  `drawn_step(context, t, account, shape, state, check, uniform, options) -> state`: the branch with one drawn outcome;
- `close_survival(context, account, shape, margin_state, survival, prices) -> (survived, liquidated)`: terminal values;
- `profit_and_loss(account, state) -> ProfitAndLoss`: where the drawn branch's money went.
"""
