"""Recurrent networks as people write them: torch's layers and cells, packed sequences, and loops by hand."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.suites.case import Cases, noise

BATCH, STEPS, WORDS, FEATURES, CLASSES = 3, 7, 53, 10, 5

CASES = Cases()


def _series(*lead: int) -> tuple[Tensor, ...]:
    """A batch of series, [batch steps features] unless `lead` says otherwise."""
    return (noise(*(lead or (BATCH, STEPS)), FEATURES),)


def _words(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, WORDS, shape or (BATCH, STEPS), generator=torch.Generator().manual_seed(seed))


def _sentences() -> tuple[Tensor, ...]:
    return (_words(),)


def _with_lengths() -> tuple[Tensor, ...]:
    """Padded sentences, longest first, and their lengths."""
    return _words(), torch.tensor([STEPS, STEPS - 2, STEPS - 3])


def _unsorted() -> tuple[Tensor, ...]:
    return _words(), torch.tensor([STEPS - 3, STEPS, STEPS - 2])


def _pair() -> tuple[Tensor, ...]:
    """A source sentence and a longer target sentence."""
    return _words(), _words(BATCH, STEPS + 2, seed=2)


# --- torch's layers ---------------------------------------------------------------------------------------------


@CASES.network("lstm_classifier", _series, kind=nn.LSTM)
@CASES.network("gru_classifier", _series, kind=nn.GRU)
@CASES.network("rnn_classifier", _series, kind=nn.RNN)
@CASES.network("rnn_relu_classifier", _series, kind=nn.RNN, nonlinearity="relu")
@CASES.network("lstm_three_layers", _series, kind=nn.LSTM, num_layers=3, dropout=0.2)
@CASES.network("gru_three_layers", _series, kind=nn.GRU, num_layers=3, dropout=0.2)
@CASES.network("rnn_three_layers", _series, kind=nn.RNN, num_layers=3, dropout=0.2)
@CASES.network("bilstm_classifier", _series, kind=nn.LSTM, num_layers=2, bidirectional=True)
@CASES.network("bigru_classifier", _series, kind=nn.GRU, num_layers=2, bidirectional=True)
@CASES.network("birnn_classifier", _series, kind=nn.RNN, num_layers=2, bidirectional=True)
@CASES.network("lstm_projected", _series, kind=nn.LSTM, proj_size=12)
@CASES.network(
    "bilstm_projected_two_layers", _series, kind=nn.LSTM, num_layers=2, bidirectional=True, proj_size=12
)
@CASES.network("lstm_without_biases", _series, kind=nn.LSTM, bias=False)
@CASES.network("lstm_time_first", partial(_series, STEPS, BATCH), kind=nn.LSTM, batch_first=False)
@CASES.network(
    "bigru_time_first", partial(_series, STEPS, BATCH), kind=nn.GRU, bidirectional=True, batch_first=False
)
@CASES.network("lstm_without_batch", partial(_series, STEPS), kind=nn.LSTM)
class SeriesClassifier(nn.Module):
    """One recurrent module, its outputs at the last step, a linear head."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, 20)
        self.rnn = kind(20, 24, batch_first=batch_first, **options)
        width = options.get("proj_size") or 24
        self.head = nn.Linear(width * (2 if options.get("bidirectional") else 1), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(torch.relu(self.enter(x)))
        last = y[:, -1] if self.rnn.batch_first and y.dim() == 3 else y[-1]
        return self.head(last)


@CASES.network("lstm_last_state", _series, kind=nn.LSTM)
@CASES.network("gru_last_state", _series, kind=nn.GRU)
@CASES.network("bilstm_last_states", _series, kind=nn.LSTM, both=True)
@CASES.network("bigru_last_states", _series, kind=nn.GRU, both=True)
class LastState(nn.Module):
    """The last states of the last layer, both directions joined, are classified."""

    def __init__(self, kind: type[nn.RNNBase], both: bool = False) -> None:
        super().__init__()
        self.rnn = kind(FEATURES, 24, num_layers=2, batch_first=True, bidirectional=both)
        self.both, self.head = both, nn.Linear(48 if both else 24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.rnn(x)
        h = state[0] if isinstance(state, tuple) else state
        return self.head(torch.cat([h[-2], h[-1]], 1) if self.both else h[-1])


@CASES.network("lstm_zero_state", _series, kind=nn.LSTM)
@CASES.network("gru_zero_state", _series, kind=nn.GRU)
class ZeroState(nn.Module):
    """First states made by new_zeros from attributes, as tutorials do."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.hidden, self.layers = 24, 2
        self.rnn = kind(FEATURES, self.hidden, self.layers, batch_first=True)
        self.head = nn.Linear(self.hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(self.layers, x.size(0), self.hidden)
        state = (h, torch.zeros(self.layers, x.size(0), self.hidden)) if self.rnn.mode == "LSTM" else h
        y, _ = self.rnn(x, tuple(s.to(x) for s in state) if isinstance(state, tuple) else state)
        return self.head(y[:, -1, :])


@CASES.network("gru_learned_state", _series)
class LearnedState(nn.Module):
    """The first state is a parameter, expanded to the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(FEATURES, 24, batch_first=True), nn.Linear(24, CLASSES)
        self.first = nn.Parameter(torch.randn(1, 1, 24) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x, self.first.expand(-1, x.shape[0], -1).contiguous())[0].mean(1))


@CASES.network(
    "lstm_state_in_and_out", lambda: (*_series(), noise(1, BATCH, 24), noise(1, BATCH, 24, seed=2))
)
class StateInAndOut(nn.Module):
    """First states are inputs and last states outputs, so their width stays; the layers around it may shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.rnn = nn.Linear(FEATURES, 20), nn.LSTM(20, 24, batch_first=True)
        self.deep, self.head = nn.Linear(24, 18), nn.Linear(18, CLASSES)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.rnn(torch.relu(self.enter(x)), (h, c))
        return self.head(torch.relu(self.deep(y))), state


@CASES.network("lstm_packed", _with_lengths, kind=nn.LSTM)
@CASES.network("gru_packed", _with_lengths, kind=nn.GRU)
@CASES.network("rnn_packed", _with_lengths, kind=nn.RNN)
@CASES.network("bilstm_packed_unsorted", _unsorted, kind=nn.LSTM, bidirectional=True, num_layers=2)
@CASES.network("bigru_packed_unsorted", _unsorted, kind=nn.GRU, bidirectional=True, num_layers=2)
@CASES.network("birnn_packed_unsorted", _unsorted, kind=nn.RNN, bidirectional=True, num_layers=2)
@CASES.network("lstm_packed_projected", _unsorted, kind=nn.LSTM, proj_size=12)
class PackedTagger(nn.Module):
    """Embedding, packed sequence, recurrent module, padded again, a tag per word."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.rnn = kind(16, 24, batch_first=True, **options)
        width = options.get("proj_size") or 24
        self.head = nn.Linear(width * (2 if options.get("bidirectional") else 1), CLASSES)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(words), lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(y)


@CASES.network("lstm_packed_last_state", _with_lengths, kind=nn.LSTM)
@CASES.network("gru_packed_last_state", _with_lengths, kind=nn.GRU)
class PackedLastState(nn.Module):
    """The last state of each sentence of a packed batch is classified."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(WORDS, 16, padding_idx=0), kind(16, 24, batch_first=True)
        self.head = nn.Sequential(nn.Linear(24, 18), nn.ReLU(), nn.Linear(18, CLASSES))

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        _, state = self.rnn(pack_padded_sequence(self.embed(words), lengths, batch_first=True))
        return self.head((state[0] if isinstance(state, tuple) else state)[-1])


@CASES.network("bilstm_tagger", _sentences)
class BiLstmTagger(nn.Module):
    """Embedding, two layers of a bidirectional LSTM, dropout, a tag per word."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(WORDS, 16), nn.Dropout(0.3)
        self.rnn = nn.LSTM(16, 24, num_layers=2, bidirectional=True, batch_first=True, dropout=0.3)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.drop(self.rnn(self.drop(self.embed(words)))[0]))


@CASES.network("char_cnn_tagger", lambda: (_words(), _words(BATCH, STEPS, 6, seed=2)))
class CharCnnTagger(nn.Module):
    """Convolution over the characters of each word, maximum, joined with the word, BiLSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.chars = nn.Embedding(WORDS, 16), nn.Embedding(WORDS, 9)
        self.conv = nn.Conv1d(9, 14, 3, padding=1)
        self.rnn = nn.LSTM(30, 22, bidirectional=True, batch_first=True)
        self.head = nn.Linear(44, CLASSES)

    def forward(self, words: Tensor, chars: Tensor) -> Tensor:
        n, steps, letters = chars.shape
        c = self.chars(chars).view(n * steps, letters, -1).transpose(1, 2)
        c = torch.relu(self.conv(c)).max(2)[0].view(n, steps, -1)
        return self.head(self.rnn(torch.cat([self.words(words), c], 2))[0])


@CASES.network("cnn_lstm", lambda: (noise(BATCH, 4, 3, 16, 18),))
class CnnLstm(nn.Module):
    """A small CNN on each frame of a clip, an LSTM over the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.rnn, self.head = nn.LSTM(12, 24, batch_first=True), nn.Linear(24, CLASSES)

    def forward(self, clip: Tensor) -> Tensor:
        n, frames = clip.shape[:2]
        y = self.cnn(clip.flatten(0, 1)).flatten(1).view(n, frames, -1)
        return self.head(self.rnn(y)[0][:, -1])


@CASES.network("crnn", lambda: (noise(BATCH, 1, 16, 44),))
class Crnn(nn.Module):
    """Text recognition: columns of a convolutional map are the steps of a bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 20, 3, padding=1)
        self.norm = nn.BatchNorm2d(20)
        self.rnn, self.mid = nn.LSTM(80, 24, bidirectional=True), nn.Linear(48, 30)
        self.again, self.head = nn.LSTM(30, 24, bidirectional=True), nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.a(x)), 2)
        x = F.max_pool2d(torch.relu(self.norm(self.b(x))), 2)
        n, c, h, w = x.size()
        x = x.view(n, c * h, w).permute(2, 0, 1)
        x = self.mid(self.rnn(x)[0])
        return self.head(self.again(x)[0]).log_softmax(2)


@CASES.network("language_model_tied", lambda: (_words(STEPS, BATCH),))
class TiedLanguageModel(nn.Module):
    """The output layer shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(WORDS, 24), nn.LSTM(24, 24, 2, dropout=0.2)
        self.decoder = nn.Linear(24, WORDS)
        self.decoder.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.decoder(self.rnn(self.embed(words))[0]).view(-1, WORDS).log_softmax(1)


@CASES.network("language_model_state", lambda: (_words(STEPS, BATCH), noise(2, BATCH, 24)))
class LanguageModelWithState(nn.Module):
    """The state comes in and goes out, so the recurrent width stays; the embedding may shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(WORDS, 16), nn.GRU(16, 24, 2), nn.Linear(24, WORDS)

    def forward(self, words: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.rnn(self.embed(words), state)
        return self.head(y), state


@CASES.network("awd_lstm", lambda: (_words(STEPS, BATCH),))
class AwdLstm(nn.Module):
    """A list of single LSTMs of different widths, locked dropout between them, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        widths = [16, 26, 26, 16]
        self.rnns = nn.ModuleList(nn.LSTM(a, b) for a, b in pairwise(widths))
        self.decoder = nn.Linear(16, WORDS)
        self.decoder.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        y = self.embed(words)
        for rnn in self.rnns:
            y, _ = rnn(y)
            keep = (
                y.new_empty(1, y.size(1), y.size(2)).bernoulli_(0.8)
                if self.training
                else torch.ones_like(y[:1])
            )
            y = y * keep
        return self.decoder(y)


@CASES.network("residual_lstm_stack", _series)
class ResidualStack(nn.Module):
    """LSTMs with residual sums and layer norms between them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, 20)
        self.rnns = nn.ModuleList(nn.LSTM(20, 20, batch_first=True) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(20) for _ in range(3))
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for rnn, norm in zip(self.rnns, self.norms, strict=True):
            x = x + rnn(norm(x))[0]
        return self.head(x.mean(1))


@CASES.network("attention_pooled_bilstm", _with_lengths)
class AttentionPooled(nn.Module):
    """A BiGRU whose outputs are averaged by attention over the words that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(WORDS, 16), nn.GRU(16, 24, bidirectional=True, batch_first=True)
        self.key, self.query = nn.Linear(48, 18), nn.Linear(18, 1, bias=False)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        y, _ = self.rnn(self.embed(words))
        score = self.query(torch.tanh(self.key(y))).squeeze(-1)
        there = torch.arange(words.shape[1])[None] < lengths[:, None]
        weight = score.masked_fill(~there, float("-inf")).softmax(1)
        return self.head(torch.bmm(weight.unsqueeze(1), y).squeeze(1))


@CASES.network("siamese_lstm", lambda: (_words(), _words(seed=2)))
class SiameseLstm(nn.Module):
    """One encoder for two sentences, their states compared."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(WORDS, 16), nn.LSTM(16, 24, batch_first=True)
        self.head = nn.Sequential(nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, CLASSES))

    def encode(self, words: Tensor) -> Tensor:
        return self.rnn(self.embed(words))[1][0][-1]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        u, v = self.encode(a), self.encode(b)
        return self.head(torch.cat([u, v, (u - v).abs(), u * v], 1))


# --- encoders and decoders --------------------------------------------------------------------------------------


@CASES.network("seq2seq", _pair, kind=nn.LSTM)
@CASES.network("seq2seq_gru", _pair, kind=nn.GRU)
class Seq2Seq(nn.Module):
    """The encoder's last states are the decoder's first ones."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, 16), nn.Embedding(WORDS, 14)
        self.encoder, self.decoder = kind(16, 24, 2, batch_first=True), kind(14, 24, 2, batch_first=True)
        self.head = nn.Linear(24, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, state = self.encoder(self.source(source))
        return self.head(self.decoder(self.target(target), state)[0])


@CASES.network("seq2seq_attention", _pair)
class Seq2SeqAttention(nn.Module):
    """Bahdanau: a bidirectional encoder, additive attention in every step of a GRU decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, 16), nn.Embedding(WORDS, 14)
        self.encoder = nn.GRU(16, 22, bidirectional=True, batch_first=True)
        self.bridge, self.decoder = nn.Linear(44, 26), nn.GRU(14 + 44, 26, batch_first=True)
        self.attend, self.score = nn.Linear(44 + 26, 20), nn.Linear(20, 1, bias=False)
        self.head = nn.Linear(26 + 44 + 14, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, h = self.encoder(self.source(source))
        h = torch.tanh(self.bridge(torch.cat((h[-2], h[-1]), 1)))
        out = []
        for t in range(4):
            word = self.target(target[:, t : t + 1])
            wide = h.unsqueeze(1).repeat(1, memory.shape[1], 1)
            energy = torch.tanh(self.attend(torch.cat((wide, memory), 2)))
            weight = self.score(energy).squeeze(2).softmax(1)
            context = torch.bmm(weight.unsqueeze(1), memory)
            y, state = self.decoder(torch.cat((word, context), 2), h.unsqueeze(0))
            h = state.squeeze(0)
            out.append(self.head(torch.cat((y, context, word), 2)))
        return torch.cat(out, 1)


@CASES.network("seq2seq_luong", _pair)
class Seq2SeqLuong(nn.Module):
    """Luong: dot-product attention on the decoder's outputs, greedy input feeding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.encoder, self.decoder = nn.LSTM(16, 24, batch_first=True), nn.LSTMCell(16 + 24, 24)
        self.combine, self.head = nn.Linear(48, 24), nn.Linear(24, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, (h, c) = self.encoder(self.embed(source))
        h, c, feed, out = h[0], c[0], memory.new_zeros(memory.shape[0], memory.shape[2]), []
        for t in range(3):
            h, c = self.decoder(torch.cat([self.embed(target[:, t]), feed], 1), (h, c))
            weight = torch.einsum("nd,nsd->ns", h, memory).softmax(-1)
            feed = torch.tanh(self.combine(torch.cat([torch.einsum("ns,nsd->nd", weight, memory), h], 1)))
            out.append(self.head(feed))
        return torch.stack(out, 1)


@CASES.network("pointer_network", lambda: (noise(BATCH, STEPS, 2),))
class PointerNetwork(nn.Module):
    """The decoder points at a position of the input in each step and reads it next."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Linear(2, 14), nn.LSTM(14, 24, batch_first=True)
        self.decoder, self.first = nn.LSTMCell(14, 24), nn.Parameter(torch.randn(14))
        self.keys, self.query, self.v = nn.Linear(24, 18, bias=False), nn.Linear(24, 18), nn.Linear(18, 1)

    def forward(self, points: Tensor) -> Tensor:
        x = self.embed(points)
        memory, (h, c) = self.encoder(x)
        h, c, keys, out = h.squeeze(0), c.squeeze(0), self.keys(memory), []
        inp = self.first.unsqueeze(0).expand(x.size(0), -1)
        taken = torch.zeros(x.shape[:2], dtype=torch.bool)
        for _ in range(3):
            h, c = self.decoder(inp, (h, c))
            score = self.v(torch.tanh(keys + self.query(h).unsqueeze(1))).squeeze(-1).masked_fill(taken, -1e4)
            best = score.argmax(1)
            taken = taken.scatter(1, best[:, None], True)
            inp = x[torch.arange(x.size(0)), best]
            out.append(score.log_softmax(-1))
        return torch.stack(out, 1)


@CASES.network("tacotron_decoder", lambda: (_words(), noise(BATCH, 4, 12)))
class TacotronDecoder(nn.Module):
    """Location-sensitive attention, prenet, two LSTM cells, frames and a stop token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(WORDS, 16), nn.Conv1d(16, 16, 5, padding=2)
        self.norm, self.encoder = nn.BatchNorm1d(16), nn.LSTM(16, 10, bidirectional=True, batch_first=True)
        self.prenet = nn.Sequential(nn.Linear(12, 18), nn.ReLU(), nn.Linear(18, 14), nn.ReLU())
        self.attention_rnn, self.decoder_rnn = nn.LSTMCell(14 + 20, 26), nn.LSTMCell(26 + 20, 22)
        self.query, self.memory, self.v = nn.Linear(26, 15), nn.Linear(20, 15), nn.Linear(15, 1)
        self.location, self.where = nn.Conv1d(2, 8, 5, padding=2), nn.Linear(8, 15)
        self.frame, self.gate = nn.Linear(22 + 20, 12), nn.Linear(22 + 20, 1)

    def forward(self, words: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.norm(self.conv(self.embed(words).transpose(1, 2)))).transpose(1, 2)
        memory, _ = self.encoder(x)
        keys, n, steps = self.memory(memory), memory.size(0), memory.size(1)
        h, c = (memory.new_zeros(n, self.attention_rnn.hidden_size) for _ in range(2))
        h2, c2 = (memory.new_zeros(n, self.decoder_rnn.hidden_size) for _ in range(2))
        weight = total = memory.new_zeros(n, steps)
        context, out, stop = memory.new_zeros(n, memory.size(2)), [], []
        for t in range(3):
            h, c = self.attention_rnn(torch.cat((self.prenet(frames[:, t]), context), -1), (h, c))
            place = self.location(torch.stack((weight, total), 1)).transpose(1, 2)
            energy = self.v(torch.tanh(self.query(h).unsqueeze(1) + keys + self.where(place))).squeeze(-1)
            weight = energy.softmax(1)
            total = total + weight
            context = torch.bmm(weight.unsqueeze(1), memory).squeeze(1)
            h2, c2 = self.decoder_rnn(torch.cat((h, context), -1), (h2, c2))
            joined = torch.cat((h2, context), 1)
            out.append(self.frame(joined))
            stop.append(self.gate(joined))
        return torch.stack(out, 1), torch.cat(stop, 1)


@CASES.network("listen_attend_spell", lambda: (noise(BATCH, 8, FEATURES),))
class PyramidalEncoder(nn.Module):
    """A pyramid of BiLSTMs: two steps are joined to one of twice the width before each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(FEATURES, 12, bidirectional=True, batch_first=True)
        self.second = nn.LSTM(48, 12, bidirectional=True, batch_first=True)
        self.third = nn.LSTM(48, 12, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, CLASSES)

    def join(self, x: Tensor) -> Tensor:
        return x.contiguous().view(x.size(0), x.size(1) // 2, x.size(2) * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.first(x)
        x, _ = self.second(self.join(x))
        x, _ = self.third(self.join(x))
        return self.head(x)


@CASES.network("vrnn_autoencoder", _series)
class SequenceAutoencoder(nn.Module):
    """An LSTM squeezes a series into one vector, another unrolls it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.spread = (
            nn.LSTM(FEATURES, 24, batch_first=True),
            nn.Linear(24, 8),
            nn.Linear(24, 8),
        )
        self.decoder, self.head = nn.LSTM(8, 24, batch_first=True), nn.Linear(24, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)[1][0].squeeze(0)
        z = self.mean(h) + self.spread(h).mul(0.5).exp() * 0.1
        return self.head(self.decoder(z.unsqueeze(1).repeat(1, x.size(1), 1))[0])


# --- torch's cells in loops -------------------------------------------------------------------------------------


@CASES.network("lstm_cell_loop", _series, kind=nn.LSTMCell)
@CASES.network("gru_cell_loop", _series, kind=nn.GRUCell)
@CASES.network("rnn_cell_loop", _series, kind=nn.RNNCell)
class CellLoop(nn.Module):
    """Two stacked cells in a Python loop, their states made by the cell or from sizes."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.a, self.b, self.head = kind(FEATURES, 24), kind(24, 22), nn.Linear(22, CLASSES)
        self.pair = kind is nn.LSTMCell

    def forward(self, x: Tensor) -> Tensor:
        first, second = None, x.new_zeros(x.size(0), self.b.hidden_size)
        second = (second, second.clone()) if self.pair else second
        out = []
        for step in x.unbind(1):
            first = self.a(step, first)
            second = self.b(first[0] if self.pair else first, second)
            out.append(second[0] if self.pair else second)
        return self.head(torch.stack(out, 1))


@CASES.network("wave_rnn", lambda: (noise(BATCH, 4, 1), noise(BATCH, 4, 12)))
class WaveRnn(nn.Module):
    """Two residual GRUs on a sample and conditioning features, as in vocoders."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(1 + 6, 24)
        self.a, self.b = nn.GRU(24, 24, batch_first=True), nn.GRU(24 + 3, 24, batch_first=True)
        self.c, self.d, self.head = nn.Linear(24 + 3, 24), nn.Linear(24, 20), nn.Linear(20, 16)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        mel, one, two = torch.split(features, [6, 3, 3], dim=2)
        x = self.enter(torch.cat([x, mel], 2))
        x = x + self.a(x)[0]
        x = x + self.b(torch.cat([x, one], 2))[0]
        x = torch.relu(self.c(torch.cat([x, two], 2)))
        return self.head(torch.relu(self.d(x)))


@CASES.network("wave_rnn_dual_softmax", lambda: (noise(BATCH, 3, 2),))
class DualSoftmaxWaveRnn(nn.Module):
    """The original: one state of which halves give coarse and fine bits; gates split by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.half = 24, 12
        self.r, self.coarse, self.fine = nn.Linear(24, 72, bias=False), nn.Linear(2, 36), nn.Linear(2, 36)
        self.o1, self.o2 = nn.Linear(12, 18), nn.Linear(18, 8)
        self.o3, self.o4 = nn.Linear(12, 18), nn.Linear(18, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, coarse, fine = x.new_zeros(x.size(0), self.hidden), [], []
        for t in range(x.size(1)):
            ru, rr, re = torch.split(self.r(h), self.hidden, dim=1)
            cu, cr, ce = torch.split(self.coarse(x[:, t]), self.half, dim=1)
            fu, fr, fe = torch.split(self.fine(x[:, t]), self.half, dim=1)
            u = torch.sigmoid(ru + torch.cat([cu, fu], 1))
            r = torch.sigmoid(rr + torch.cat([cr, fr], 1))
            e = torch.tanh(r * re + torch.cat([ce, fe], 1))
            h = u * h + (1 - u) * e
            c, f = torch.split(h, self.half, dim=1)
            coarse.append(self.o2(torch.relu(self.o1(c))))
            fine.append(self.o4(torch.relu(self.o3(f))))
        return torch.stack(coarse, 1), torch.stack(fine, 1)


# --- cells by hand ----------------------------------------------------------------------------------------------


@CASES.network("gru_by_hand", _series)
class GruByHand(nn.Module):
    """Two linear maps, gates by chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 24
        self.i, self.h = nn.Linear(FEATURES, 72), nn.Linear(24, 72)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), self.hidden, device=x.device, dtype=x.dtype)
        for t in range(x.size(1)):
            ir, iz, new = self.i(x[:, t]).chunk(3, 1)
            hr, hz, hn = self.h(h).chunk(3, 1)
            z = torch.sigmoid(iz + hz)
            h = (1 - z) * torch.tanh(new + torch.sigmoid(ir + hr) * hn) + z * h
        return self.head(h)


@CASES.network("lstm_by_hand", _series)
class LstmByHand(nn.Module):
    """Raw parameters, one product for all gates, slices of it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 24
        self.w, self.u = (
            nn.Parameter(torch.randn(FEATURES, 96) * 0.2),
            nn.Parameter(torch.randn(24, 96) * 0.2),
        )
        self.b, self.head = nn.Parameter(torch.zeros(96)), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n, h = self.hidden, torch.zeros(x.shape[0], self.hidden).to(x)
        c, out = torch.zeros(x.shape[0], self.hidden).to(x), []
        for t in range(x.shape[1]):
            gates = x[:, t, :] @ self.w + h @ self.u + self.b
            i, f = torch.sigmoid(gates[:, :n]), torch.sigmoid(gates[:, n : n * 2])
            g, o = torch.tanh(gates[:, n * 2 : n * 3]), torch.sigmoid(gates[:, n * 3 :])
            c = f * c + i * g
            h = o * torch.tanh(c)
            out.append(h.unsqueeze(0))
        return self.head(torch.cat(out, 0).transpose(0, 1).contiguous())


@CASES.network("lstm_concatenated", _series)
class LstmConcatenated(nn.Module):
    """One linear map a gate on the input and state joined; peephole weights; layer norm on the cell."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.i, self.o, self.g = (nn.Linear(FEATURES + 24, 24) for _ in range(4))
        self.pf, self.pi = nn.Parameter(torch.randn(24) * 0.1), nn.Parameter(torch.randn(24) * 0.1)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(0), self.f.out_features)
        for t in range(4):
            joined = torch.cat((x[:, t], h), 1)
            f = torch.sigmoid(self.f(joined) + self.pf * c)
            i = torch.sigmoid(self.i(joined) + self.pi * c)
            c = f * c + i * torch.tanh(self.g(joined))
            h = torch.sigmoid(self.o(joined)) * torch.tanh(self.norm(c))
        return self.head(h)


class _NormCell(nn.Module):
    """A GRU cell with a layer norm over each product."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.i, self.h = nn.Linear(width, 3 * hidden, bias=False), nn.Linear(hidden, 3 * hidden, bias=False)
        self.ni, self.nh = nn.LayerNorm(3 * hidden), nn.LayerNorm(3 * hidden)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        r, z, new = self.ni(self.i(x)).chunk(3, -1)
        rh, zh, nh = self.nh(self.h(h)).chunk(3, -1)
        z = torch.sigmoid(z + zh)
        return torch.lerp(torch.tanh(new + torch.sigmoid(r + rh) * nh), h, z)


@CASES.network("layer_norm_gru", _series)
class LayerNormGru(nn.Module):
    """A cell that normalises its gates together, as world models use."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.cell, self.head = nn.Linear(FEATURES, 20), _NormCell(20, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.enter(x))
        h = x.new_zeros(x.shape[0], 24)
        for t in range(4):
            h = self.cell(x[:, t], h)
        return self.head(h)


@CASES.network("ind_rnn", _series)
class IndRnn(nn.Module):
    """Each unit recurs on itself only."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.u = nn.Linear(FEATURES, 24), nn.Parameter(torch.rand(24))
        self.again, self.v = nn.Linear(24, 22), nn.Parameter(torch.rand(22))
        self.head = nn.Linear(22, CLASSES)

    def scan(self, x: Tensor, u: Tensor) -> Tensor:
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = torch.relu(x[:, t] + u * h)
            out.append(h)
        return torch.stack(out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scan(self.again(self.scan(self.i(x), self.u)), self.v)[:, -1])


@CASES.network("qrnn", _series)
class Qrnn(nn.Module):
    """Gates by a causal convolution over time, a pooling loop."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(FEATURES, 72, 2), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z, f, o = self.conv(F.pad(x.transpose(1, 2), (1, 0))).chunk(3, 1)
        z, f, o, c, out = z.tanh(), f.sigmoid(), o.sigmoid(), None, []
        for t in range(z.size(2)):
            c = (1 - f[..., t]) * z[..., t] if c is None else f[..., t] * c + (1 - f[..., t]) * z[..., t]
            out.append(o[..., t] * c)
        return self.head(torch.stack(out, 2).mean(2))


@CASES.network("sru", _series)
class Sru(nn.Module):
    """All products at once, light recurrence, highway connection."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.u = nn.Linear(FEATURES, 24), nn.Linear(24, 72, bias=False)
        self.vf, self.vr = nn.Parameter(torch.randn(24) * 0.2), nn.Parameter(torch.randn(24) * 0.2)
        self.bf, self.br = nn.Parameter(torch.zeros(24)), nn.Parameter(torch.zeros(24))
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        u = self.u(x).view(x.size(0), x.size(1), 3, -1)
        c, out = x.new_zeros(x.size(0), x.size(2)), []
        for t in range(x.size(1)):
            f = torch.sigmoid(u[:, t, 1] + self.vf * c + self.bf)
            r = torch.sigmoid(u[:, t, 2] + self.vr * c + self.br)
            c = f * c + (1 - f) * u[:, t, 0]
            out.append(r * c + (1 - r) * x[:, t])
        return self.head(torch.stack(out, 1))


@CASES.network("min_lstm", _series)
class MinLstm(nn.Module):
    """Parallel in time: gates do not see the state; a cumulative sum in place of a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gates, self.out = nn.Linear(FEATURES, 20), nn.Linear(20, 72), nn.Linear(24, 20)
        self.norm, self.head = nn.RMSNorm(20), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        f, i, h = self.gates(self.norm(x)).chunk(3, -1)
        diff = F.softplus(-f) - F.softplus(-i)
        log_f, log_i = -F.softplus(diff), -F.softplus(-diff)
        decay = F.pad(log_f.cumsum(1), (0, 0, 1, 0))[:, 1:]
        y = torch.exp(decay + torch.logcumsumexp(log_i + F.logsigmoid(h) - decay, dim=1))
        return self.head((x + self.out(y)).mean(1))


@CASES.network("min_gru", _series)
class MinGru(nn.Module):
    """One gate and one candidate, blended in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.h, self.head = nn.Linear(FEATURES, 24), nn.Linear(FEATURES, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z, new = torch.sigmoid(self.z(x)), self.h(x)
        h = torch.zeros(x.size(0), new.size(-1), dtype=x.dtype)
        for t in range(x.size(1)):
            h = torch.lerp(h, new[:, t], z[:, t])
        return self.head(h)


@CASES.network("echo_state", _series)
class EchoState(nn.Module):
    """A fixed random reservoir in buffers, a trained readout."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("win", torch.randn(40, FEATURES) * 0.3)
        self.register_buffer("w", torch.randn(40, 40) * 0.1)
        self.leak, self.deep, self.head = 0.3, nn.Linear(40, 18), nn.Linear(18, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.w.shape[0])
        for t in range(x.shape[1]):
            h = (1 - self.leak) * h + self.leak * torch.tanh(x[:, t] @ self.win.T + h @ self.w.T)
        return self.head(torch.relu(self.deep(h)))


@CASES.network("clockwork_rnn", _series)
class ClockworkRnn(nn.Module):
    """Modules of the state are updated at their own rates."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.fast = 24, 8
        self.i, self.h, self.head = nn.Linear(FEATURES, 24), nn.Linear(24, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h, fast = x.new_zeros(x.shape[0], self.hidden), self.fast
        for t in range(x.shape[1]):
            new = torch.tanh(self.i(x[:, t]) + self.h(h))
            h = torch.cat([new[:, :fast], new[:, fast:] if t % 2 == 0 else h[:, fast:]], 1)
        return self.head(h)


class _ConvLstmCell(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden_dim, self.conv = hidden, nn.Conv2d(width + hidden, 4 * hidden, 3, padding=1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, o, g = torch.split(self.conv(torch.cat([x, h], 1)), self.hidden_dim, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = x.size(0), self.hidden_dim, x.size(-2), x.size(-1)
        return torch.zeros(shape, device=x.device).to(x), torch.zeros(shape, device=x.device).to(x)


@CASES.network("conv_lstm", lambda: (noise(2, 3, 3, 8, 9),))
class ConvLstm(nn.Module):
    """Two ConvLSTM cells over a clip, the next frame out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = _ConvLstmCell(3, 12), _ConvLstmCell(12, 10), nn.Conv2d(10, 3, 1)

    def forward(self, clip: Tensor) -> Tensor:
        first, second = self.a.first(clip), self.b.first(clip)
        for t in range(clip.size(1)):
            first = self.a(clip[:, t], first)
            second = self.b(first[0], second)
        return self.head(second[0])


@CASES.network("conv_gru", lambda: (noise(2, 3, 3, 8, 9),))
class ConvGru(nn.Module):
    """Separate convolutions for gates and candidate, state made from the input's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 12
        self.gates, self.new = nn.Conv2d(15, 24, 3, padding=1), nn.Conv2d(15, 12, 3, padding=1)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, clip: Tensor) -> Tensor:
        h = clip.new_zeros([clip.shape[0], self.hidden, *clip.shape[-2:]])
        for x in clip.unbind(1):
            z, r = self.gates(torch.cat([x, h], 1)).sigmoid().chunk(2, 1)
            h = (1 - z) * h + z * torch.tanh(self.new(torch.cat([x, r * h], 1)))
        return self.head(h)


# --- state spaces, linear attention, memories -------------------------------------------------------------------


@CASES.network("selective_scan", _series)
class SelectiveScan(nn.Module):
    """A Mamba block in plain torch: causal depthwise convolution, input-dependent steps, a scan in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(FEATURES, 20), nn.LayerNorm(20)
        self.inner, self.states, self.rank = 40, 6, 3
        self.up, self.conv = nn.Linear(20, 80, bias=False), nn.Conv1d(40, 40, 4, groups=40, padding=3)
        self.x_proj, self.dt_proj = nn.Linear(40, 3 + 12, bias=False), nn.Linear(3, 40)
        self.a_log, self.d = (
            nn.Parameter(torch.log(torch.arange(1, 7).float()).repeat(40, 1)),
            nn.Parameter(torch.ones(40)),
        )
        self.down, self.head = nn.Linear(40, 20, bias=False), nn.Linear(20, CLASSES)

    def block(self, x: Tensor) -> Tensor:
        steps = x.shape[1]
        u, gate = self.up(x).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :steps].transpose(1, 2))
        dt, b, c = self.x_proj(u).split([self.rank, self.states, self.states], -1)
        dt = F.softplus(self.dt_proj(dt))
        decay = torch.exp(dt[..., None] * -torch.exp(self.a_log))
        drive = (dt * u)[..., None] * b[:, :, None]
        h, out = x.new_zeros(x.shape[0], self.inner, self.states), []
        for t in range(steps):
            h = decay[:, t] * h + drive[:, t]
            out.append((h @ c[:, t, :, None]).squeeze(-1))
        return self.down((torch.stack(out, 1) + self.d * u) * F.silu(gate))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.head(x + self.block(self.norm(x)))


@CASES.network("diagonal_state_space", _series)
class DiagonalStateSpace(nn.Module):
    """S4D: complex diagonal kernel made from parameters, applied by a loop over the states' real part."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.out = nn.Linear(FEATURES, 20), nn.Linear(20, 40)
        self.log_dt, self.log_a = nn.Parameter(torch.rand(20) - 3), nn.Parameter(torch.rand(20, 4))
        self.imag, self.c = nn.Parameter(torch.rand(20, 4) * 3), nn.Parameter(torch.randn(20, 4, 2) * 0.3)
        self.d, self.head = nn.Parameter(torch.randn(20)), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        u = self.enter(x).transpose(1, 2)
        steps = u.size(-1)
        a = -self.log_a.exp() + 1j * self.imag
        dta = a * self.log_dt.exp().unsqueeze(-1)
        c = torch.view_as_complex(self.c) * (dta.exp() - 1) / a
        k = 2 * torch.einsum("hn,hnl->hl", c, torch.exp(dta.unsqueeze(-1) * torch.arange(steps))).real
        spectrum = torch.fft.rfft(u, n=2 * steps) * torch.fft.rfft(k, n=2 * steps)
        y = torch.fft.irfft(spectrum, n=2 * steps)[..., :steps] + u * self.d.unsqueeze(-1)
        return self.head(F.glu(self.out(F.gelu(y).transpose(1, 2)), -1).mean(1))


@CASES.network("rwkv", _sentences)
class Rwkv(nn.Module):
    """Time mixing with a token shift and a decayed numerator and denominator, channel mixing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.norm2 = nn.Embedding(WORDS, 24), nn.LayerNorm(24), nn.LayerNorm(24)
        self.mix = nn.ParameterList(nn.Parameter(torch.rand(1, 1, 24)) for _ in range(5))
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.decay, self.bonus = nn.Parameter(torch.rand(24)), nn.Parameter(torch.rand(24))
        self.k, self.v, self.r = (nn.Linear(24, 24, bias=False) for _ in range(3))
        self.o, self.ck, self.cv = nn.Linear(24, 24, bias=False), nn.Linear(24, 40), nn.Linear(40, 24)
        self.cr, self.head = nn.Linear(24, 24), nn.Linear(24, WORDS)

    def time_mix(self, x: Tensor) -> Tensor:
        before = self.shift(x)
        k, v, r = (
            f(x * m + before * (1 - m)) for f, m in zip((self.k, self.v, self.r), self.mix, strict=False)
        )
        top = bottom = torch.zeros_like(k[:, 0])
        decay, out = torch.exp(-torch.exp(self.decay)), []
        for t in range(x.shape[1]):
            now = torch.exp(self.bonus + k[:, t])
            out.append((top + now * v[:, t]) / (bottom + now))
            top, bottom = decay * top + k[:, t].exp() * v[:, t], decay * bottom + k[:, t].exp()
        return self.o(torch.sigmoid(r) * torch.stack(out, 1))

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        x = x + self.time_mix(self.norm(x))
        y = self.norm2(x)
        before = self.shift(y)
        k = torch.relu(self.ck(y * self.mix[3] + before * (1 - self.mix[3]))).square()
        r = torch.sigmoid(self.cr(y * self.mix[4] + before * (1 - self.mix[4])))
        return self.head(x + r * self.cv(k))


@CASES.network("retention", _sentences)
class Retention(nn.Module):
    """RetNet in recurrent form: a matrix state per head with a fixed decay, group norm on the heads' outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.embed = 4, nn.Embedding(WORDS, 24)
        self.q, self.k, self.v = (nn.Linear(24, 32, bias=False) for _ in range(3))
        self.register_buffer("decay", 1 - 2.0 ** (-5 - torch.arange(4.0)))
        self.norm, self.o, self.head = nn.GroupNorm(4, 32), nn.Linear(32, 24), nn.Linear(24, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        n, steps, _ = x.shape
        q, k, v = (f(x).view(n, steps, self.heads, -1) for f in (self.q, self.k, self.v))
        state, out = None, []
        for t in range(steps):
            new = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            state = new if state is None else state * self.decay.view(1, -1, 1, 1) + new
            out.append((q[:, t].unsqueeze(-1) * state).sum(-2))
        y = self.norm(torch.stack(out, 1).reshape(n * steps, -1)).view(n, steps, -1)
        return self.head(x + self.o(y))


@CASES.network("delta_net", _sentences)
class DeltaNet(nn.Module):
    """Linear attention with the delta rule: normalised keys, a write strength, einsums."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.beta = nn.Embedding(WORDS, 24), nn.Linear(24, 96), nn.Linear(24, 4)
        self.o, self.head = nn.Linear(32, 24), nn.Linear(24, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
        q, k, beta = F.normalize(q, dim=-1), F.normalize(k, dim=-1), self.beta(x).sigmoid()
        state, out = x.new_zeros(x.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
        for t in range(x.shape[1]):
            old = torch.einsum("nhkv,nhk->nhv", state, k[:, t])
            new = beta[:, t, :, None] * (v[:, t] - old)
            state = state + torch.einsum("nhk,nhv->nhkv", k[:, t], new)
            out.append(torch.einsum("nhkv,nhk->nhv", state, q[:, t]))
        return self.head(x + self.o(torch.stack(out, 1).flatten(2)))


@CASES.network("neural_turing_machine", _series)
class NeuralTuringMachine(nn.Module):
    """A controller that reads and writes a memory by content."""

    def __init__(self) -> None:
        super().__init__()
        self.slots, self.width = 9, 14
        self.controller = nn.LSTMCell(FEATURES + 14, 24)
        self.key, self.strength = nn.Linear(24, 14), nn.Linear(24, 1)
        self.write_key, self.erase, self.add = nn.Linear(24, 14), nn.Linear(24, 14), nn.Linear(24, 14)
        self.memory, self.head = nn.Parameter(torch.randn(9, 14) * 0.3), nn.Linear(24 + 14, CLASSES)

    def address(self, memory: Tensor, key: Tensor) -> Tensor:
        return F.cosine_similarity(memory + 1e-6, key.unsqueeze(1) + 1e-6, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        memory, read, out = self.memory.repeat(n, 1, 1), x.new_zeros(n, self.width), []
        h, c = x.new_zeros(n, self.controller.hidden_size), x.new_zeros(n, self.controller.hidden_size)
        for t in range(3):
            h, c = self.controller(torch.cat([x[:, t], read], -1), (h, c))
            weight = (F.softplus(self.strength(h)) * self.address(memory, self.key(h))).softmax(-1)
            read = torch.einsum("ns,nsd->nd", weight, memory)
            write = self.address(memory, torch.tanh(self.write_key(h))).softmax(-1).unsqueeze(-1)
            memory = memory * (1 - write * self.erase(h).sigmoid().unsqueeze(1)) + write * self.add(
                h
            ).unsqueeze(1)
            out.append(self.head(torch.cat([h, read], -1)))
        return torch.stack(out, 1)


@CASES.network("memory_network", lambda: (_words(BATCH, 6, STEPS), _words(BATCH, 4, seed=2)))
class MemoryNetwork(nn.Module):
    """End-to-end memory: sums of word vectors, several hops with shared layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Embedding(WORDS, 24), nn.Embedding(WORDS, 24)
        self.hop, self.head = nn.Linear(24, 24), nn.Linear(24, WORDS)

    def forward(self, story: Tensor, question: Tensor) -> Tensor:
        u = self.a(question).sum(1)
        for _ in range(3):
            weight = (self.a(story).sum(2) @ u.unsqueeze(-1)).squeeze(-1).softmax(1)
            u = self.hop(u) + (self.c(story).sum(2) * weight.unsqueeze(-1)).sum(1)
        return self.head(u)


@CASES.network("temporal_fusion", _series)
class GatedResidual(nn.Module):
    """Gated residual networks around an LSTM, as temporal fusion transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.rnn = nn.Linear(FEATURES, 24), nn.LSTM(24, 24, batch_first=True)
        self.fc1, self.fc2, self.gate = nn.Linear(24, 30), nn.Linear(30, 24), nn.Linear(24, 48)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = self.rnn(x)[0]
        z = F.glu(self.gate(self.fc2(F.elu(self.fc1(y)))), -1)
        return self.head(self.norm(x + z)[:, -1])


@CASES.network("deepar", lambda: (noise(BATCH, STEPS, 3), torch.tensor([0, 2, 1])))
class DeepAr(nn.Module):
    """Forecasts fed back: a static embedding, an LSTM over the past, then step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(4, 6), nn.LSTM(3 + 6, 24, 2, batch_first=True)
        self.mean, self.spread = nn.Linear(24, 3), nn.Linear(24, 3)

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        static = self.embed(which).unsqueeze(1)
        y, state = self.rnn(torch.cat([x, static.expand(-1, x.size(1), -1)], -1))
        out = []
        for _ in range(3):
            now = self.mean(y[:, -1:]) + F.softplus(self.spread(y[:, -1:])) * 0.1
            out.append(now)
            y, state = self.rnn(torch.cat([now, static], -1), state)
        return torch.cat(out, 1)
