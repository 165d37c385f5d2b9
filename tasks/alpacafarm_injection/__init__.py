"""The AlpacaFarm records under injection."""
