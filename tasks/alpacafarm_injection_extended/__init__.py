"""The AlpacaFarm records under more attacks of the same family."""
