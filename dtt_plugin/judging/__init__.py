"""A second opinion on saved responses: a language model is asked whether they did what the attacker wanted."""
