"""Numbers alone: trade-off functions, their composition, estimates from samples, discoveries."""
