"""Moves DefensiveTokens to another model, and makes the turned twin that proves the map."""
