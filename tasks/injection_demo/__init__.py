"""Our own records under injection."""
