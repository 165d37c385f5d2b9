"""A user's own records under injection."""
