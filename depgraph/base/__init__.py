"""What every stage uses: errors, example inputs, nested values, progress, tables, and what a run switches."""
