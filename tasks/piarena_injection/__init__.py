"""PIArena: questions about short contexts, under five attacks with realistic aims."""
