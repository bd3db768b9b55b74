"""Hand-written networks of the kinds that users have, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.models import control, images, mixers, recommenders, scenes, series, speech
from benchmarks.suites.case import Cases, Inputs, noise, tensor_inputs


def numbers(below: int, *shape: int, seed: int = 5) -> Tensor:
    """Integers below a bound."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def _tensors(*shapes: tuple[int, ...]) -> Callable[[], Inputs]:
    return partial(tensor_inputs, *shapes)


FRAMES, SERIES, IMAGE, TOKENS = (2, 28, 20), (3, 6, 20), (2, 3, 16, 24), (2, 9)
WORDS = {"inputs": lambda: (numbers(19, *TOKENS),)}
PEOPLE = lambda: (numbers(11, 7), numbers(13, 7, seed=6))  # noqa: E731

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "conformer": (speech.Conformer, _tensors(FRAMES)),
    "wavenet": (speech.WaveNet, lambda: (numbers(17, 2, 21),)),
    "tacotron2": (speech.Tacotron, lambda: (numbers(19, 2, 7),)),
    "wav2letter": (speech.Wav2Letter, _tensors(FRAMES)),
    "deep_speech_2": (speech.DeepSpeech2, _tensors(FRAMES)),
    "rnn_transducer": (speech.Transducer, lambda: (noise(*FRAMES), numbers(11, 2, 5))),
    "conv_tasnet": (speech.TasNet, _tensors((2, 160))),
    "keyword_spotter": (speech.KeywordSpotter, _tensors((2, 480))),
    "x_vector": (speech.TimeDelay, _tensors(FRAMES)),
    "tcn": (series.TemporalConvNet, _tensors(SERIES)),
    "n_beats": (series.NBeats, _tensors((3, 20))),
    "informer": (series.Informer, _tensors(SERIES)),
    "patch_tst": (series.PatchTST, _tensors(SERIES)),
    "times_net": (series.TimesNet, _tensors(SERIES)),
    "dlinear": (series.SeriesDecomposition, _tensors(SERIES)),
    "inception_time": (series.InceptionTime, _tensors(SERIES)),
    "nerf": (scenes.RadianceField, _tensors((5, 7, 3), (5, 3))),
    "siren": (scenes.Siren, _tensors((35, 2))),
    "hash_grid": (scenes.HashGrid, _tensors((35, 3))),
    "pointnet": (scenes.PointNet, _tensors((2, 3, 21))),
    "pointnet_plus": (scenes.PointNetPlus, _tensors((2, 21, 3))),
    "set_transformer": (scenes.SetTransformer, _tensors((3, 7, 6))),
    "perceiver_io": (scenes.PerceiverIO, _tensors((3, 7, 6))),
    "dlrm": (recommenders.DLRM, lambda: (noise(5, 7), numbers(11, 5, 3, 2))),
    "deep_fm": (recommenders.DeepFM, lambda: (numbers(11, 5, 3),)),
    "deep_cross": (recommenders.CrossNetwork, lambda: (noise(5, 7), numbers(11, 5, 2))),
    "two_tower": (recommenders.TwoTower, PEOPLE),
    "ncf": (recommenders.NeuralCF, PEOPLE),
    "sasrec": (recommenders.SequenceRecommender, WORDS["inputs"]),
    "ft_transformer": (recommenders.FeatureTransformer, lambda: (noise(7, 5), numbers(3, 7, 2))),
    "tabnet": (recommenders.TabNetStep, _tensors((7, 12))),
    "mlp_mixer": (mixers.Mixer, _tensors(IMAGE)),
    "gmlp": (mixers.GatedMLP, WORDS["inputs"]),
    "fnet": (mixers.FNet, WORDS["inputs"]),
    "moe_modules": (mixers.RoutedModules, _tensors((2, 9, 6))),
    "moe_stacked": (mixers.StackedExperts, _tensors((2, 9, 6))),
    "moe_chosen": (partial(mixers.StackedExperts, dense=False), _tensors((2, 9, 6))),
    "moe_switch": (mixers.SwitchExperts, _tensors((2, 9, 6))),
    "linear_attention": (mixers.LinearAttention, WORDS["inputs"]),
    "state_space": (mixers.StateSpace, WORDS["inputs"]),
    "long_convolution": (mixers.LongConvolution, WORDS["inputs"]),
    "retention": (mixers.Retention, WORDS["inputs"]),
    "actor_critic": (control.ActorCritic, _tensors((5, 9))),
    "dueling_dqn": (control.DuelingQ, _tensors((2, 4, 52, 68))),
    "distributional_dqn": (control.DistributionalQ, _tensors((5, 9))),
    "alpha_zero": (control.GameTower, _tensors((3, 5, 5, 5))),
    "dreamer": (control.WorldModel, _tensors((2, 5, 9), (2, 5, 3))),
    "edsr": (images.EDSR, _tensors(IMAGE)),
    "espcn": (images.ESPCN, _tensors((2, 1, 10, 14))),
    "rcan": (images.ChannelAttentionSR, _tensors(IMAGE)),
    "crnn": (images.CRNN, _tensors((2, 1, 16, 36))),
    "siamese": (images.Siamese, _tensors(IMAGE, IMAGE)),
    "triplet": (images.Triplet, _tensors(IMAGE, IMAGE, IMAGE)),
    "clip": (images.Contrastive, lambda: (noise(3, 3, 16, 24), numbers(19, 3, 9))),
    "capsules": (images.CapsuleNet, _tensors((2, 1, 19, 23))),
    "neural_ode": (images.ODENet, _tensors((5, 6))),
    "equilibrium": (images.DEQ, _tensors((5, 6))),
    "vae": (images.VAE, _tensors((2, 1, 16, 24))),
    "vq_vae": (images.VectorQuantised, _tensors((2, 1, 16, 24))),
    "dcgan": (images.DCGAN, _tensors((2, 10, 1, 1))),
    "stylegan": (images.StyleGenerator, _tensors((3, 10))),
    "adain": (images.AdaIN, _tensors(IMAGE, IMAGE)),
    "cyclegan": (images.CycleGenerator, _tensors(IMAGE)),
    "real_nvp": (images.RealNVP, _tensors((5, 6))),
    "glow": (images.Glow, _tensors(IMAGE)),
    "made": (images.MaskedAutoregressive, _tensors((5, 6))),
    "hopfield": (images.EnergyHopfield, _tensors((5, 12))),
    "kan": (images.KAN, _tensors((5, 6))),
    "fourier_operator": (images.FourierOperator, _tensors((2, 12, 14, 3))),
    "deep_onet": (images.DeepONet, _tensors((3, 9), (3, 7, 2))),
    "unfold_fold": (images.Pix2Struct, _tensors(IMAGE)),
    "masked_autoencoder": (images.MaskedImageModel, _tensors(IMAGE, (2, 24))),
    "pointer_network": (images.PointerNetwork, _tensors((2, 7, 2))),
}


CASES = Cases()
for _name, (_build, _inputs) in NETWORKS.items():
    CASES.add(_name, _build, _inputs, getattr(_build, "__doc__", "") or "")
