"""What the cases of the quality benchmark are made of, held against values by hand; nothing is downloaded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import depgraph
from benchmarks.real import cases, nets, proteins, tones

PDB = """\
REMARK a comment
ATOM      1  N   GLY A   7      11.000  12.500 -13.250  1.00  0.00           N
ATOM      2  CA AGLY A   7      21.000  22.500 -23.250  0.50  0.00           C
ATOM      3  CA BGLY A   7      91.000  92.500 -93.250  0.50  0.00           C
ATOM      4  C   GLY A   7      31.000  32.500 -33.250  1.00  0.00           C
ATOM      5  O   GLY A   7      41.000  42.500 -43.250  1.00  0.00           O
ATOM      6  N   TRP A   9       1.000   2.000   3.000  1.00  0.00           N
ATOM      7  CA  TRP A   9       4.000   5.000   6.000  1.00  0.00           C
ATOM      8  C   TRP A   9       7.000   8.000   9.000  1.00  0.00           C
ATOM      9  O   TRP A   9      10.000  11.000  12.000  1.00  0.00           O
ATOM     10  N   ALA A  10       1.000   2.000   3.000  1.00  0.00           N
ATOM     11  CA  ALA A  10       1.000   2.000   3.000  1.00  0.00           C
ATOM     12  N   SER B   1       1.000   2.000   3.000  1.00  0.00           N
ATOM     13  CA  SER B   1       1.000   2.000   3.000  1.00  0.00           C
ATOM     14  C   SER B   1       1.000   2.000   3.000  1.00  0.00           C
ATOM     15  O   SER B   1       5.000   2.000   3.000  1.00  0.00           O
HETATM   16  N   MSE B   2       1.000   2.000   3.000  1.00  0.00           N
ENDMDL
ATOM     17  N   SER C   1       1.000   2.000   3.000  1.00  0.00           N
ATOM     18  CA  SER C   1       1.000   2.000   3.000  1.00  0.00           C
ATOM     19  C   SER C   1       1.000   2.000   3.000  1.00  0.00           C
ATOM     20  O   SER C   1       1.000   2.000   3.000  1.00  0.00           O
"""


def test_the_chains_of_a_file_in_either_format(tmp_path: Path):
    path = tmp_path / "some.pdb"
    path.write_text(PDB)
    first, second = proteins.chains(path)
    assert first.sequence.tolist() == [proteins.LETTERS.index("G"), proteins.LETTERS.index("W")]
    assert first.numbers.tolist() == [7, 9]  # residue 10 has no C and no O
    assert first.backbone[0].tolist() == [
        [11, 12.5, -13.25], [21, 22.5, -23.25], [31, 32.5, -33.25], [41, 42.5, -43.25]
    ]  # fmt: skip
    assert second.sequence.tolist() == [proteins.LETTERS.index("S")]
    names = ("label_comp_id", "label_atom_id", "auth_asym_id", "auth_seq_id", "Cartn_z", "Cartn_x", "Cartn_y")
    lines = ["loop_", "_atom_site.group_PDB", *(f"_atom_site.{name} " for name in names)]
    for line in PDB.split("ENDMDL", maxsplit=1)[0].splitlines():
        if line.startswith("ATOM"):
            values = [
                line[a:b].strip()
                for a, b in ((17, 20), (12, 16), (21, 22), (22, 26), (46, 54), (30, 38), (38, 46))
            ]
            lines.append(" ".join(["ATOM", *values]))
    other = tmp_path / "some.cif"
    other.write_text("\n".join(lines))
    for chain, same in zip(proteins.chains(path), proteins.chains(other), strict=True):
        assert torch.equal(chain.backbone, same.backbone)
        assert torch.equal(chain.sequence, same.sequence)
        assert torch.equal(chain.numbers, same.numbers)


def test_letters_are_those_of_the_residues():
    three = dict(zip(proteins.NAMES, proteins.LETTERS, strict=False))
    assert len(three) == 20
    assert [three[name] for name in ("ARG", "ASN", "ASP", "GLN", "GLU", "LYS", "PHE", "TRP", "TYR")] == list(
        "RNDQEKFWY"
    )


def test_the_loss_and_the_share_of_a_design():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.5, 0.375]])
    given = proteins.loss(probabilities.log()[None], torch.tensor([1, 1]))
    assert given.item() == pytest.approx((math.log(4) + math.log(2)) / 2)
    found, wanted = [torch.tensor([1, 2]), torch.tensor([3])], [torch.tensor([1, 0]), torch.tensor([3])]
    assert proteins.agreement(found, wanted) == pytest.approx(2 / 3)


def test_a_tone_is_of_the_harmonics_of_its_pitch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tones, "NOISE", (300.0, 300.0))
    frames, pitch = tones.tones(7, seed=3)
    assert frames.shape == (7, 1024)
    assert torch.allclose(frames.mean(1), torch.zeros(7), atol=1e-5)
    assert torch.allclose(frames.std(1), torch.ones(7), atol=1e-5)
    hertz = 10 * 2 ** (pitch / 1200)
    assert tones.cents(hertz).tolist() == pytest.approx(pitch.tolist())
    assert bool(((hertz > 65) & (hertz < 1047)).all())

    def unexplained(factor: float) -> list[float]:
        found = []
        for frame, f in zip(frames.double(), hertz * factor, strict=True):
            angle = 2 * math.pi * f / 16_000 * torch.arange(1024)[:, None] * torch.arange(1, 13)
            waves = torch.cat([angle.sin(), angle.cos(), torch.ones(1024, 1)], 1)
            residual = frame[:, None] - waves @ (torch.linalg.pinv(waves) @ frame[:, None])
            found.append(residual.square().mean().item())
        return found

    assert max(unexplained(1.0)) < 1e-10
    assert min(unexplained(1.03)) > 1e-2


def test_a_pitch_is_read_from_what_a_network_is_trained_to_say():
    pitch = torch.linspace(2400, 8800, 31, dtype=torch.float64)
    assert torch.allclose(tones.pitches(tones.blurred(pitch)), pitch, atol=1.0)
    wrong = tones.blurred(pitch) + 0.5 * tones.blurred(pitch + 500)
    assert tones.near(tones.pitches(wrong), pitch) == 1.0
    assert tones.near(pitch + torch.tensor([49.0, 51.0])[torch.arange(31) % 2], pitch) == pytest.approx(
        16 / 31
    )


def test_calibration_tones_are_never_evaluated_and_follow_from_the_seed():
    first, again, other = (tones.calibration(128, seed) for seed in (0, 0, 1))
    assert torch.equal(first[1][0], again[1][0])
    assert not torch.equal(first[0][0], other[0][0])
    evaluated = tones.tones(128, seed=0)[0]
    assert not any(torch.equal(frame, row) for frame in first[0][0] for row in evaluated)


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours = nets.Attention(12, 3)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    x = torch.randn(2, 5, 12)
    assert torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-6)


def test_a_patch_of_the_vision_transformer_is_seven_pixels_wide():
    net = nets.VisionTransformer(width=12, depth=1, heads=3, hidden=7).eval()
    image = torch.randn(1, 1, 28, 28)
    windows = F.unfold(image, 7, stride=7)[0].mT
    tokens = windows @ net.patches.weight.flatten(1).mT + net.patches.bias + net.positions[0]
    mean = net.norm(net.blocks(tokens[None])).mean(1)
    assert torch.allclose(net(image), net.head(mean), atol=1e-5)


def test_the_vision_transformer_loses_whole_heads_by_the_hints_and_by_depgraph():
    tp = pytest.importorskip("torch_pruning")
    case = cases.case("vit-0.5")
    x = torch.randn(2, 1, 28, 28)
    net = nets.build("vit").eval()
    result = depgraph.prune(net, x, max_macs=0.5)
    assert case.budget.cost(result.model, case.example()) <= 0.5 * case.budget.cost(net, case.example())
    pruner = tp.pruner.BasePruner(
        net, x, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.5, head_pruning_ratio=0.5,
        **case.hints.arguments(net),
    )  # fmt: skip
    pruner.step()
    case.hints.repair(net, pruner)
    assert net(x).shape == (2, 10)
    assert [block.attention.num_heads for block in net.blocks] == [2] * 6
