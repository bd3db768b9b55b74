"""A plan is data: what stays of each tensor; its JSON, its composition, its names, and the optimizer that follows it."""
