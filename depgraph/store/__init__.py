"""Folder <-> smaller model: the plans as JSON, the weights as safetensors, and nothing that is code.

document.py   plan.json: what it has, written and read with suspicion
weights.py    tensors in safetensors files: shards, checksums
folders.py    a folder that is replaced as a whole, files that are opened with care
factory.py    the original from the user's own code, without memory for its weights where that is faithful
saving.py     model -> folder
loading.py    folder -> model
"""

from .loading import load, load_plans
from .saving import save

__all__ = ["load", "load_plans", "save"]
