"""Files of DefensiveTokens: reading, writing, sharing and measuring them."""
