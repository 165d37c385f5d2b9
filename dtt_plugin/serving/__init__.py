"""DefensiveTokens in a running engine: the base model as it is, and any number of token files beside it."""
