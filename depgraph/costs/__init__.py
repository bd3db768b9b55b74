"""Parameters, MACs, bytes, memory and seconds, as functions of what is kept; budgets in them."""
