"""Pruning a checkpoint that is larger than memory: files in, smaller files out, one block of values at a time.

shell.py     the model without memory for its parameters
source.py    its values, read from files when they are asked for, and notes on what was computed of them
writing.py   files written as a stream, in a folder that gets its name at the end, and a journal
original.py  what a checkpoint and its model are
outcome.py   what is written of a plan, and the proof on it
pruning.py   the one call
"""

from .outcome import CheckpointResult
from .pruning import Forecast, prune, shell

__all__ = ["CheckpointResult", "Forecast", "prune", "shell"]
