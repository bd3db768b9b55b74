"""Hand-written networks of the kinds that users have, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.suites import handmade as h
from benchmarks.suites.case import Case, Inputs, noise, seeded, tensor_inputs

SMALL = ("conformer", "wavenet", "stylegan", "moe_modules", "pointnet", "dlrm")


def numbers(below: int, *shape: int, seed: int = 5) -> Tensor:
    """Integers below a bound."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def _tensors(*shapes: tuple[int, ...]) -> Callable[[], Inputs]:
    return partial(tensor_inputs, *shapes)


FRAMES, SERIES, IMAGE, TOKENS = (2, 28, 20), (3, 6, 20), (2, 3, 16, 24), (2, 9)
WORDS = {"inputs": lambda: (numbers(19, *TOKENS),)}
PEOPLE = lambda: (numbers(11, 7), numbers(13, 7, seed=6))  # noqa: E731

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "conformer": (h.Conformer, _tensors(FRAMES)),
    "wavenet": (h.WaveNet, lambda: (numbers(17, 2, 21),)),
    "tacotron2": (h.Tacotron, lambda: (numbers(19, 2, 7),)),
    "wav2letter": (h.Wav2Letter, _tensors(FRAMES)),
    "deep_speech_2": (h.DeepSpeech2, _tensors(FRAMES)),
    "rnn_transducer": (h.Transducer, lambda: (noise(*FRAMES), numbers(11, 2, 5))),
    "conv_tasnet": (h.TasNet, _tensors((2, 160))),
    "keyword_spotter": (h.KeywordSpotter, _tensors((2, 480))),
    "x_vector": (h.TimeDelay, _tensors(FRAMES)),
    "tcn": (h.TemporalConvNet, _tensors(SERIES)),
    "n_beats": (h.NBeats, _tensors((3, 20))),
    "informer": (h.Informer, _tensors(SERIES)),
    "patch_tst": (h.PatchTST, _tensors(SERIES)),
    "times_net": (h.TimesNet, _tensors(SERIES)),
    "dlinear": (h.SeriesDecomposition, _tensors(SERIES)),
    "inception_time": (h.InceptionTime, _tensors(SERIES)),
    "nerf": (h.RadianceField, _tensors((5, 7, 3), (5, 3))),
    "siren": (h.Siren, _tensors((35, 2))),
    "hash_grid": (h.HashGrid, _tensors((35, 3))),
    "pointnet": (h.PointNet, _tensors((2, 3, 21))),
    "pointnet_plus": (h.PointNetPlus, _tensors((2, 21, 3))),
    "set_transformer": (h.SetTransformer, _tensors((3, 7, 6))),
    "perceiver_io": (h.PerceiverIO, _tensors((3, 7, 6))),
    "dlrm": (h.DLRM, lambda: (noise(5, 7), numbers(11, 5, 3, 2))),
    "deep_fm": (h.DeepFM, lambda: (numbers(11, 5, 3),)),
    "deep_cross": (h.CrossNetwork, lambda: (noise(5, 7), numbers(11, 5, 2))),
    "two_tower": (h.TwoTower, PEOPLE),
    "ncf": (h.NeuralCF, PEOPLE),
    "sasrec": (h.SequenceRecommender, WORDS["inputs"]),
    "ft_transformer": (h.FeatureTransformer, lambda: (noise(7, 5), numbers(3, 7, 2))),
    "tabnet": (h.TabNetStep, _tensors((7, 12))),
    "mlp_mixer": (h.Mixer, _tensors(IMAGE)),
    "gmlp": (h.GatedMLP, WORDS["inputs"]),
    "fnet": (h.FNet, WORDS["inputs"]),
    "moe_modules": (h.RoutedModules, _tensors((2, 9, 6))),
    "moe_stacked": (h.StackedExperts, _tensors((2, 9, 6))),
    "moe_chosen": (partial(h.StackedExperts, dense=False), _tensors((2, 9, 6))),
    "moe_switch": (h.SwitchExperts, _tensors((2, 9, 6))),
    "linear_attention": (h.LinearAttention, WORDS["inputs"]),
    "state_space": (h.StateSpace, WORDS["inputs"]),
    "long_convolution": (h.LongConvolution, WORDS["inputs"]),
    "retention": (h.Retention, WORDS["inputs"]),
    "actor_critic": (h.ActorCritic, _tensors((5, 9))),
    "dueling_dqn": (h.DuelingQ, _tensors((2, 4, 52, 68))),
    "distributional_dqn": (h.DistributionalQ, _tensors((5, 9))),
    "alpha_zero": (h.GameTower, _tensors((3, 5, 5, 5))),
    "dreamer": (h.WorldModel, _tensors((2, 5, 9), (2, 5, 3))),
    "edsr": (h.EDSR, _tensors(IMAGE)),
    "espcn": (h.ESPCN, _tensors((2, 1, 10, 14))),
    "rcan": (h.ChannelAttentionSR, _tensors(IMAGE)),
    "crnn": (h.CRNN, _tensors((2, 1, 16, 36))),
    "siamese": (h.Siamese, _tensors(IMAGE, IMAGE)),
    "triplet": (h.Triplet, _tensors(IMAGE, IMAGE, IMAGE)),
    "clip": (h.Contrastive, lambda: (noise(3, 3, 16, 24), numbers(19, 3, 9))),
    "capsules": (h.CapsuleNet, _tensors((2, 1, 19, 23))),
    "neural_ode": (h.ODENet, _tensors((5, 6))),
    "equilibrium": (h.DEQ, _tensors((5, 6))),
    "vae": (h.VAE, _tensors((2, 1, 16, 24))),
    "vq_vae": (h.VectorQuantised, _tensors((2, 1, 16, 24))),
    "dcgan": (h.DCGAN, _tensors((2, 10, 1, 1))),
    "stylegan": (h.StyleGenerator, _tensors((3, 10))),
    "adain": (h.AdaIN, _tensors(IMAGE, IMAGE)),
    "cyclegan": (h.CycleGenerator, _tensors(IMAGE)),
    "real_nvp": (h.RealNVP, _tensors((5, 6))),
    "glow": (h.Glow, _tensors(IMAGE)),
    "made": (h.MaskedAutoregressive, _tensors((5, 6))),
    "hopfield": (h.EnergyHopfield, _tensors((5, 12))),
    "kan": (h.KAN, _tensors((5, 6))),
    "fourier_operator": (h.FourierOperator, _tensors((2, 12, 14, 3))),
    "deep_onet": (h.DeepONet, _tensors((3, 9), (3, 7, 2))),
    "unfold_fold": (h.Pix2Struct, _tensors(IMAGE)),
    "masked_autoencoder": (h.MaskedImageModel, _tensors(IMAGE, (2, 24))),
    "pointer_network": (h.PointerNetwork, _tensors((2, 7, 2))),
}


def cases() -> dict[str, Case]:
    """One case a network."""
    return {
        name: Case(name, partial(seeded, build), inputs, getattr(build, "__doc__", "") or "")
        for name, (build, inputs) in NETWORKS.items()
    }
