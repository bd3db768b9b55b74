"""Networks for images: super-resolution, text, pairs, capsules, flows, generators; and a few of their kind on vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.layers import mlp


class EDSR(nn.Module):
    """Residual blocks without norms, a global skip, pixel shuffle."""

    def __init__(self, width: int = 16, blocks: int = 3, scale: int = 2):
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
            )
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.Sequential(nn.Conv2d(width, width * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        self.tail = nn.Conv2d(width, 3, 3, padding=1)
        self.register_buffer("mean", torch.tensor([0.45, 0.44, 0.40]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x - self.mean)
        y = x
        for block in self.body:
            y = y + 0.1 * block(y)
        return self.tail(self.up(x + self.last(y))) + self.mean


class ESPCN(nn.Module):
    """Convolutions at low resolution and one pixel shuffle at the end."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 20, 5, padding=2), nn.Tanh(), nn.Conv2d(20, 12, 3, padding=1), nn.Tanh(),
            nn.Conv2d(12, 9, 3, padding=1), nn.PixelShuffle(3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sigmoid()


class ChannelAttentionSR(nn.Module):
    """Dense blocks with channel attention, nearest upsampling (RCAN, ESRGAN)."""

    def __init__(self, width: int = 12, growth: int = 8):
        super().__init__()
        self.head, self.tail = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.dense = nn.ModuleList(nn.Conv2d(width + i * growth, growth, 3, padding=1) for i in range(3))
        self.join = nn.Conv2d(width + 3 * growth, width, 1)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 6, 1), nn.ReLU(), nn.Conv2d(6, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        parts = [x]
        for conv in self.dense:
            parts.append(F.leaky_relu(conv(torch.cat(parts, 1)), 0.2))
        y = self.join(torch.cat(parts, 1))
        y = x + 0.2 * y * self.squeeze(y)
        return self.tail(F.interpolate(y, scale_factor=2, mode="nearest"))


class CRNN(nn.Module):
    """Text lines: convolutions squeeze the height away, two recurrent layers read the width."""

    def __init__(self, classes: int = 13):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d((2, 1)),
            nn.Conv2d(16, 20, (4, 3), padding=(0, 1)), nn.ReLU(),
        )  # fmt: skip
        self.rnn = nn.LSTM(20, 18, 2, bidirectional=True)
        self.out = nn.Linear(36, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).squeeze(2).permute(2, 0, 1)
        return self.out(self.rnn(x)[0]).log_softmax(2)


def _small_encoder(out: int, width: int = 16) -> nn.Sequential:
    """Three strided convolutions and a projection."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, out),
    )  # fmt: skip


class Siamese(nn.Module):
    """One encoder for both images; their absolute difference is judged."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = _small_encoder(20), mlp(20, 12, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head((self.encoder(a) - self.encoder(b)).abs()).sigmoid()


class Triplet(nn.Module):
    """Normalised embeddings of three images and the distances between them."""

    def __init__(self):
        super().__init__()
        self.encoder, self.project = _small_encoder(20), nn.Linear(20, 12)

    def forward(self, a: Tensor, p: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        a, p, n = (F.normalize(self.project(self.encoder(x).relu()), dim=1) for x in (a, p, n))
        return F.pairwise_distance(a, p), F.pairwise_distance(a, n)


class Contrastive(nn.Module):
    """Images and texts in one space (CLIP style): all-pairs scores."""

    def __init__(self, width: int = 14):
        super().__init__()
        self.image = _small_encoder(width)
        self.embed = nn.Embedding(19, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.text = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.project = nn.Parameter(torch.randn(16, width) / 4)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        a = self.image(images)
        y = self.text(self.embed(text))
        b = y[torch.arange(y.shape[0]), text.argmax(-1)] @ self.project
        a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
        return self.scale.exp() * a @ b.t()


class CapsuleNet(nn.Module):
    """Primary capsules, routing by agreement in three rounds, lengths as scores, a decoder."""

    def __init__(self, classes: int = 4, primary: int = 6, d_in: int = 4, d_out: int = 8):
        super().__init__()
        self.d_in = d_in
        self.conv, self.primary = nn.Conv2d(1, 16, 5, 2), nn.Conv2d(16, primary * d_in, 3, 2)
        self.weight = nn.Parameter(torch.randn(classes, primary * 3 * 4, d_out, d_in) / 4)
        self.decoder = mlp(classes * d_out, 24, 12)

    @staticmethod
    def squash(x: Tensor) -> Tensor:
        """Shorten vectors to below one."""
        square = x.square().sum(-1, keepdim=True)
        return square / (1 + square) * x / (square + 1e-8).sqrt()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.primary(self.conv(x).relu())
        n, c, h, w = x.shape
        u = self.squash(
            x.view(n, c // self.d_in, self.d_in, h, w).permute(0, 1, 3, 4, 2).reshape(n, -1, self.d_in)
        )
        votes = torch.einsum("jiod,nid->njio", self.weight, u)
        logits = torch.zeros(n, *self.weight.shape[:2]).to(x)
        for _ in range(3):
            v = self.squash((logits.softmax(1).unsqueeze(-1) * votes).sum(2))
            logits = logits + (votes * v.unsqueeze(2)).sum(-1)
        return v.norm(dim=-1), self.decoder(v.flatten(1))


class ODENet(nn.Module):
    """A field integrated with a fixed number of Runge-Kutta steps; time joins as a channel."""

    def __init__(self, width: int = 14, steps: int = 3):
        super().__init__()
        self.steps = steps
        self.inp, self.out = nn.Linear(6, width), nn.Linear(width, 5)
        self.first, self.second = nn.Linear(width + 1, 20), nn.Linear(20, width)

    def field(self, t: float, x: Tensor) -> Tensor:
        """The derivative at time `t`."""
        time = torch.full_like(x[:, :1], t)
        return self.second(torch.tanh(self.first(torch.cat((x, time), 1))))

    def forward(self, x: Tensor) -> Tensor:
        x, h = self.inp(x), 1 / self.steps
        for i in range(self.steps):
            t = i * h
            a = self.field(t, x)
            b = self.field(t + h / 2, x + h / 2 * a)
            c = self.field(t + h / 2, x + h / 2 * b)
            d = self.field(t + h, x + h * c)
            x = x + h / 6 * (a + 2 * b + 2 * c + d)
        return self.out(x)


class DEQ(nn.Module):
    """A layer iterated until it settles (data-dependent number of steps)."""

    def __init__(self, width: int = 14):
        super().__init__()
        self.inp, self.out = nn.Linear(6, width), nn.Linear(width, 5)
        self.first, self.second, self.norm = nn.Linear(width, 20), nn.Linear(20, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        z = torch.zeros_like(x)
        for _ in range(6):
            new = self.norm(x + 0.1 * self.second(self.first(z).relu()))
            z = new
        return self.out(z)


class VAE(nn.Module):
    """Convolutional encoder to mean and log variance, a sample, a transposed decoder."""

    def __init__(self, latent: int = 6):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.mean, self.log_var = nn.Linear(16 * 4 * 6, latent), nn.Linear(16 * 4 * 6, latent)
        self.inp = nn.Linear(latent, 16 * 4 * 6)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(16, 12, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(12, 1, 4, 2, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.encoder(x)
        mean, log_var = self.mean(y), self.log_var(y)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp() if self.training else mean
        return self.decoder(self.inp(z).relu().view(-1, 16, 4, 6)), mean, log_var


class VectorQuantised(nn.Module):
    """VQ-VAE: nearest codes by distance, straight-through gradients, commitment loss as an output."""

    def __init__(self, codes: int = 11, width: int = 12, code: int = 8):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, code, 1),
        )
        self.codes = nn.Embedding(codes, code)
        self.decoder = nn.Sequential(
            nn.Conv2d(code, width, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(width, 1, 4, 2, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.encoder(x).permute(0, 2, 3, 1).contiguous()
        flat = z.view(-1, z.shape[-1])
        w = self.codes.weight
        distance = flat.square().sum(1, keepdim=True) + w.square().sum(1) - 2 * flat @ w.t()
        index = distance.argmin(1)
        q = self.codes(index).view(z.shape)
        loss = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(q.detach(), z)
        q = z + (q - z).detach()
        return self.decoder(q.permute(0, 3, 1, 2)), loss, index


class DCGAN(nn.Module):
    """Generator and discriminator in one module: noise to image to score."""

    def __init__(self, latent: int = 10, width: int = 8):
        super().__init__()
        w = width
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(latent, 4 * w, 4, 1, 0, bias=False), nn.BatchNorm2d(4 * w), nn.ReLU(),
            nn.ConvTranspose2d(4 * w, 2 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * w), nn.ReLU(),
            nn.ConvTranspose2d(2 * w, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, w, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(w, 2 * w, 4, 2, 1)), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * w, 1, 4),
        )  # fmt: skip

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        image = self.generator(z)
        return image, self.discriminator(image).view(-1)


class Modulated(nn.Module):
    """A convolution whose weights are scaled by a style a sample, run as one grouped convolution over the batch."""

    def __init__(self, a: int, b: int, style: int, k: int = 3, demodulate: bool = True, up: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, b, a, k, k) / 6)
        self.style, self.bias = nn.Linear(style, a), nn.Parameter(torch.zeros(b))
        self.demodulate, self.up, self.k, self.out = demodulate, up, k, b

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
        n, c, h, wd = x.shape
        weight = self.weight * self.style(w).view(n, 1, c, 1, 1)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        y = F.conv2d(
            x.reshape(1, n * c, h, wd),
            weight.view(n * self.out, c, self.k, self.k),
            None,
            1,
            self.k // 2,
            1,
            n,
        )
        return y.view(n, self.out, y.shape[2], y.shape[3]) + self.bias.view(1, -1, 1, 1)


class StyleGenerator(nn.Module):
    """A mapping network, a learned constant, modulated convolutions and summed images (StyleGAN2)."""

    def __init__(self, latent: int = 10, width: int = 14):
        super().__init__()
        self.mapping = mlp(latent, 16, 16, act=nn.SELU)
        self.constant = nn.Parameter(torch.randn(1, width, 4, 6))
        self.convs = nn.ModuleList(
            [Modulated(width, width, 16), Modulated(width, 10, 16, up=True), Modulated(10, 10, 16)]
        )
        self.images = nn.ModuleList([Modulated(width, 3, 16, 1, False), Modulated(10, 3, 16, 1, False)])

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8))
        x = self.constant.repeat(z.shape[0], 1, 1, 1)
        x = F.leaky_relu(self.convs[0](x, w), 0.2)
        image = self.images[0](x, w)
        x = F.leaky_relu(self.convs[1](x, w), 0.2)
        x = F.leaky_relu(self.convs[2](x, w), 0.2)
        return F.interpolate(image, scale_factor=2) + self.images[1](x, w)


class AdaIN(nn.Module):
    """Style transfer: content features take the mean and deviation of the style's."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(3, width, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.ReflectionPad2d(1), nn.Conv2d(width, 20, 3), nn.ReLU(),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(20, width, 3), nn.ReLU(), nn.Upsample(scale_factor=2),
            nn.ReflectionPad2d(1), nn.Conv2d(width, 3, 3),
        )  # fmt: skip

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        a, b = self.encoder(content), self.encoder(style)
        stats = [(x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True) + 1e-5) for x in (a, b)]
        return self.decoder((a - stats[0][0]) / stats[0][1] * stats[1][1] + stats[1][0])


class CycleGenerator(nn.Module):
    """Instance norms, reflection pads, residual blocks, transposed convolutions."""

    def __init__(self, width: int = 8):
        super().__init__()
        w = width
        self.inp = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, w, 7), nn.InstanceNorm2d(w), nn.ReLU(),
            nn.Conv2d(w, 2 * w, 3, 2, 1), nn.InstanceNorm2d(2 * w), nn.ReLU(),
        )  # fmt: skip
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReflectionPad2d(1), nn.Conv2d(2 * w, 2 * w, 3), nn.InstanceNorm2d(2 * w, affine=True), nn.ReLU(),
                nn.ReflectionPad2d(1), nn.Conv2d(2 * w, 2 * w, 3), nn.InstanceNorm2d(2 * w),
            )
            for _ in range(2)
        )  # fmt: skip
        self.out = nn.Sequential(
            nn.ConvTranspose2d(2 * w, w, 3, 2, 1, 1),
            nn.InstanceNorm2d(w),
            nn.ReLU(),
            nn.Conv2d(w, 3, 7, padding=3),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


class RealNVP(nn.Module):
    """Affine couplings with alternating checker masks; the log determinant is an output."""

    def __init__(self, size: int = 6, width: int = 20, layers: int = 3):
        super().__init__()
        self.register_buffer(
            "masks", torch.stack([(torch.arange(size) + i) % 2 for i in range(layers)]).float()
        )
        self.scale = nn.ModuleList(mlp(size, width, size) for _ in range(layers))
        self.shift = nn.ModuleList(mlp(size, width, size) for _ in range(layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[0])
        for mask, scale, shift in zip(self.masks, self.scale, self.shift, strict=True):
            kept = x * mask
            s = torch.tanh(scale(kept)) * (1 - mask)
            x = kept + (1 - mask) * (x * s.exp() + shift(kept))
            log_det = log_det + s.sum(1)
        return x, log_det


class Glow(nn.Module):
    """Squeeze, activation norm, an invertible 1 x 1 convolution, couplings of channel halves."""

    def __init__(self, channels: int = 3, width: int = 20, steps: int = 2):
        super().__init__()
        c = 4 * channels
        self.log_scale, self.shift = (nn.Parameter(torch.zeros(steps, c)) for _ in range(2))
        self.mix = nn.ParameterList(nn.Parameter(torch.linalg.qr(torch.randn(c, c))[0]) for _ in range(steps))
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c // 2, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(),
                nn.Conv2d(width, c, 3, padding=1),
            )
            for _ in range(steps)
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)
        log_det = x.new_zeros(n)
        for i, (mix, net) in enumerate(zip(self.mix, self.nets, strict=True)):
            x = (x + self.shift[i][:, None, None]) * self.log_scale[i].exp()[:, None, None]
            x = F.conv2d(x, mix[:, :, None, None])
            log_det = log_det + (self.log_scale[i].sum() + torch.linalg.slogdet(mix)[1]) * (h * w // 4)
            a, b = x.chunk(2, 1)
            s, t = net(a).chunk(2, 1)
            s = torch.sigmoid(s + 2)
            x = torch.cat((a, (b + t) * s), 1)
            log_det = log_det + s.log().flatten(1).sum(1)
        return x, log_det


class MaskedAutoregressive(nn.Module):
    """MADE: masks on the weights keep each output from seeing later inputs."""

    def __init__(self, size: int = 6, width: int = 20):
        super().__init__()
        self.first, self.second = nn.Linear(size, width), nn.Linear(width, size)
        order, hidden = torch.arange(size), torch.arange(width) % (size - 1)
        self.register_buffer("a", (hidden[:, None] >= order).float())
        self.register_buffer("b", (order[:, None] > hidden).float())

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.first.weight * self.a, self.first.bias).relu()
        return F.linear(y, self.second.weight * self.b, self.second.bias)


class EnergyHopfield(nn.Module):
    """Denoising by attention to stored patterns (modern Hopfield)."""

    def __init__(self, size: int = 12, patterns: int = 7, width: int = 16):
        super().__init__()
        self.patterns = nn.Parameter(torch.randn(patterns, size))
        self.q, self.k, self.v = nn.Linear(size, width), nn.Linear(size, width), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            weights = (self.q(x) @ self.k(self.patterns).t() * 0.5).softmax(-1)
            x = weights @ self.v(self.patterns)
        return x


class KANLayer(nn.Module):
    """A learned spline a connection: radial bases of every input, one coefficient an output, input and basis."""

    def __init__(self, a: int, b: int, bases: int = 5):
        super().__init__()
        self.register_buffer("grid", torch.linspace(-2, 2, bases))
        self.weight = nn.Parameter(torch.randn(b, a, bases) / 5)
        self.base, self.norm = nn.Linear(a, b), nn.LayerNorm(a)

    def forward(self, x: Tensor) -> Tensor:
        bases = torch.exp(-((self.norm(x).unsqueeze(-1) - self.grid) ** 2))
        return torch.einsum("nab,oab->no", bases, self.weight) + self.base(F.silu(x))


class KAN(nn.Module):
    """Three spline layers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(KANLayer(6, 14), KANLayer(14, 12), KANLayer(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class FourierOperator(nn.Module):
    """Fourier neural operator: complex weights on the lowest frequencies beside a pointwise path."""

    def __init__(self, width: int = 10, modes: int = 4, layers: int = 2):
        super().__init__()
        self.modes = modes
        self.inp, self.out = nn.Linear(3, width), mlp(width, 18, 1, act=nn.GELU)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(2, width, width, modes, modes, dtype=torch.cfloat) / width)
            for _ in range(layers)
        )
        self.skips = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x).permute(0, 3, 1, 2)
        m = self.modes
        for weight, skip in zip(self.weights, self.skips, strict=True):
            spectrum = torch.fft.rfft2(x)
            out = torch.zeros_like(spectrum)
            weight = weight.to(spectrum.dtype)
            out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :m, :m], weight[0])
            out[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, -m:, :m], weight[1])
            x = F.gelu(torch.fft.irfft2(out, s=x.shape[-2:]) + skip(x))
        return self.out(x.permute(0, 2, 3, 1))


class DeepONet(nn.Module):
    """A branch for the function, a trunk for the place, a dot product."""

    def __init__(self, sensors: int = 9, width: int = 16):
        super().__init__()
        self.branch, self.trunk = mlp(sensors, 20, width, act=nn.Tanh), mlp(2, 20, width, act=nn.Tanh)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("bp,bqp->bq", self.branch(u), self.trunk(y)) + self.bias


class Pix2Struct(nn.Module):
    """Patches by unfold, tokens, and images again by fold."""

    def __init__(self, width: int = 20, patch: int = 4):
        super().__init__()
        self.patch = patch
        self.inp, self.out = nn.Linear(3 * patch**2, width), nn.Linear(width, 3 * patch**2)
        self.mix = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), mlp(width, 32, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.inp(F.unfold(x, self.patch, stride=self.patch).transpose(1, 2))
        for mix in self.mix:
            tokens = tokens + mix(tokens)
        return F.fold(self.out(tokens).transpose(1, 2), x.shape[-2:], self.patch, stride=self.patch)


class MaskedImageModel(nn.Module):
    """Masked autoencoder: random patches are dropped by argsort, mask tokens restored by gather."""

    def __init__(self, width: int = 20, small: int = 12, patches: int = 24, keep: int = 8):
        super().__init__()
        self.keep = keep
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, patches, width))
        layer = nn.TransformerEncoderLayer(width, 4, 28, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.narrow, self.token = nn.Linear(width, small), nn.Parameter(torch.randn(1, 1, small))
        self.place = nn.Parameter(torch.randn(1, patches, small))
        layer = nn.TransformerEncoderLayer(small, 2, 20, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(small, 48)

    def forward(self, x: Tensor, dice: Tensor) -> Tensor:
        y = self.embed(x).flatten(2).transpose(1, 2) + self.position
        n, t, c = y.shape
        order = dice.argsort(1)
        back = order.argsort(1)
        y = self.encoder(torch.gather(y, 1, order[:, : self.keep, None].expand(-1, -1, c)))
        y = self.narrow(y)
        y = torch.cat((y, self.token.expand(n, t - self.keep, -1)), 1)
        y = torch.gather(y, 1, back[:, :, None].expand(-1, -1, y.shape[2]))
        return self.out(self.decoder(y + self.place))


class PointerNetwork(nn.Module):
    """Pointer network: an LSTM reads points, attention scores over them choose the next one, greedily."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.inp, self.encoder = nn.Linear(2, width), nn.LSTM(width, width, batch_first=True)
        self.cell = nn.LSTMCell(width, width)
        self.a, self.b, self.v = nn.Linear(width, 14), nn.Linear(width, 14), nn.Linear(14, 1)
        self.start = nn.Parameter(torch.randn(1, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inp(x)
        memory, (h, c) = self.encoder(y)
        h, c, step = h[0], c[0], self.start.expand(x.shape[0], -1)
        used = torch.zeros(x.shape[:2], dtype=torch.bool)
        scores, chosen = [], []
        for _ in range(x.shape[1]):
            h, c = self.cell(step, (h, c))
            energy = self.v(torch.tanh(self.a(memory) + self.b(h)[:, None])).squeeze(-1)
            energy = energy.masked_fill(used, -1e4)
            index = energy.argmax(1)
            used = used.scatter(1, index[:, None], True)
            step = y[torch.arange(x.shape[0]), index]
            scores.append(energy)
            chosen.append(index)
        return torch.stack(scores, 1), torch.stack(chosen, 1)
