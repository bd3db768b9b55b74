"""Recurrent networks: torch's layers and cells, states in and out, packed sequences, loops by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from zoo_entry import BATCH, CLASSES, TOKENS, entry, tokens


@entry(tokens(), "enter.weight:0 rnn.weight_ih_l0:1 out.weight:0")
class LstmLayer(nn.Module):
    """nn.LSTM, two layers, both directions: gates are four equal blocks."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(5, 11)
        self.rnn = nn.LSTM(11, 7, num_layers=2, bidirectional=True, batch_first=True)
        self.out, self.last = nn.Linear(14, 13), nn.Linear(13, CLASSES)

    def forward(self, x):
        y, _ = self.rnn(F.gelu(self.enter(x)))
        return self.last(F.gelu(self.out(y[:, -1])))


@entry(tokens(), "enter.weight:0 rnn.weight_ih_l0:1 out.weight:0")
class GruLayer(nn.Module):
    """nn.GRU with an explicit first state, its last state used."""

    def __init__(self):
        super().__init__()
        self.enter, self.rnn = nn.Linear(5, 11), nn.GRU(11, 7, batch_first=True)
        self.out, self.last = nn.Linear(7, 13), nn.Linear(13, CLASSES)

    def forward(self, x):
        x = F.gelu(self.enter(x))
        _, h = self.rnn(x, torch.zeros(1, x.shape[0], 7, dtype=x.dtype))
        return self.last(F.gelu(self.out(h.squeeze(0))))


@entry(tokens(), "cell.weight_ih:0 cell.weight_hh last.weight:1")
class HandWrittenLstm(nn.Module):
    """A loop over nn.LSTMCell, states made from sizes: 4 x hidden packs four gates."""

    def __init__(self):
        super().__init__()
        self.cell, self.last = nn.LSTMCell(5, 7), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor):
        h = x.new_zeros(x.shape[0], self.cell.hidden_size)
        c = torch.zeros_like(h)
        for t in range(3):
            h, c = self.cell(x[:, t], (h, c))
        return self.last(h)


@entry(tokens(), "enter.weight:0 gates.weight cell.weight last.weight:1")
class MinimalGatedUnit(nn.Module):
    """A recurrence written out with split gates and a concatenation of input and state."""

    def __init__(self):
        super().__init__()
        self.enter, self.gates, self.cell = nn.Linear(5, 7), nn.Linear(18, 22), nn.Linear(18, 11)
        self.hidden, self.last = 11, nn.Linear(11, CLASSES)

    def forward(self, x):
        x = self.enter(x)
        h = torch.tanh(self.cell(torch.cat([x[:, 0], x.new_zeros(x.shape[0], self.hidden)], -1)))
        for t in range(1, 3):
            forget, update = self.gates(torch.cat([x[:, t], h], -1)).split(self.hidden, -1)
            new = torch.tanh(self.cell(torch.cat([x[:, t], forget.sigmoid() * h], -1)))
            h = h + update.sigmoid() * (new - h)
        return self.last(h)


@entry(tokens(), "enter.weight:0 rnn.weight_hh* rnn.weight_ih_l0 last.weight:1")
class DirectionsOfTheirOwn(nn.Module):
    """Default states, last ones unused: every layer and direction keeps units of its own."""

    def __init__(self):
        super().__init__()
        self.enter, self.last = nn.Linear(5, 11), nn.Linear(14, CLASSES)
        self.rnn = nn.GRU(11, 7, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.last(self.rnn(self.enter(x))[0])


@entry(tokens(), "rnn.weight_hh* rnn.bias_ih* last.weight:1")
class StatesWrittenThroughAView(nn.Module):
    """First states that start as zeros and tell their entries apart: a bias is written into one layer's."""

    def __init__(self):
        super().__init__()
        self.first, self.rnn = nn.Linear(5, 7), nn.GRU(5, 7, 2, batch_first=True)
        self.last = nn.Linear(7, CLASSES)

    def forward(self, x):
        h = x.new_zeros(2, x.shape[0], self.rnn.hidden_size)
        h[0] = self.first(x[:, 0])
        return self.last(self.rnn(x, h)[0])


@entry(tokens(), "rnn.weight_hh* last.weight:1")
class LastStatesOfBothDirections(nn.Module):
    """The last states of the last layer, joined."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 7, 2, batch_first=True, bidirectional=True)
        self.last = nn.Linear(14, CLASSES)

    def forward(self, x):
        _, (h, _) = self.rnn(x)
        return self.last(torch.cat([h[-2], h[-1]], 1))


@entry(lambda: (torch.randn(BATCH, TOKENS, 5), torch.randn(1, BATCH, 7), torch.randn(1, BATCH, 7)),
       "enter.weight:0 rnn.weight_ih_l0:1 deep.weight:0", "rnn.weight_hh_l0")  # fmt: skip
class StatesInAndOut(nn.Module):
    """States that come in and go out keep their width; what is around the layer shrinks."""

    def __init__(self):
        super().__init__()
        self.enter, self.rnn = nn.Linear(5, 11), nn.LSTM(11, 7, batch_first=True)
        self.deep, self.last = nn.Linear(7, 13), nn.Linear(13, CLASSES)

    def forward(self, x, h, c):
        y, state = self.rnn(self.enter(x), (h, c))
        return self.last(F.gelu(self.deep(y))), state


@entry(tokens(), "encoder.weight_hh* decoder.weight_hh* last.weight:1")
class StatesHandedOn(nn.Module):
    """An encoder's last states are the decoder's first: one axis for both, all layers."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.LSTM(5, 7, 2, batch_first=True), nn.LSTM(5, 7, 2, batch_first=True)
        self.last = nn.Linear(7, CLASSES)

    def forward(self, x):
        return self.last(self.decoder(x[:, 6:], self.encoder(x[:, :6])[1])[0])


@entry(tokens(), "rnn.weight_hr* rnn.weight_hh* last.weight:1")
class Projected(nn.Module):
    """nn.LSTM with projections, two layers, both directions."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 13, 2, batch_first=True, bidirectional=True, proj_size=7)
        self.last = nn.Linear(14, CLASSES)

    def forward(self, x):
        return self.last(self.rnn(x)[0])


class Tagger(nn.Module):
    """embedding -> packed sequence -> recurrent layer -> padded -> linear."""

    def __init__(self, rnn: nn.RNNBase, width: int):
        super().__init__()
        self.embed, self.rnn, self.last = nn.Embedding(17, 11), rnn, nn.Linear(width, CLASSES)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        return self.last(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


def sentences() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 17, (3, TOKENS)), torch.tensor([8, 10, 5])


PACKED = "embed.weight:1 rnn.weight_ih* rnn.weight_hh* last.weight:1"


@entry(sentences, PACKED)
class PackedLstm(Tagger):
    """Two layers and both directions of nn.LSTM over a packed sequence."""

    def __init__(self):
        super().__init__(nn.LSTM(11, 7, 2, bidirectional=True, batch_first=True), 14)


@entry(sentences, PACKED)
class PackedGru(Tagger):
    """nn.GRU over a packed sequence."""

    def __init__(self):
        super().__init__(nn.GRU(11, 7, batch_first=True), 7)


@entry(sentences, PACKED)
class PackedRnn(Tagger):
    """nn.RNN over a packed sequence."""

    def __init__(self):
        super().__init__(nn.RNN(11, 7, bidirectional=True, batch_first=True, nonlinearity="relu"), 14)


@entry(sentences, PACKED + " rnn.weight_hr*")
class PackedProjected(Tagger):
    """Projections over a packed sequence."""

    def __init__(self):
        super().__init__(nn.LSTM(11, 13, batch_first=True, proj_size=7), 7)


@entry(sentences, "embed.weight:1 rnn.weight_ih* rnn.weight_hh* last.weight:1")
class PackedLastState(nn.Module):
    """The last state of each sentence of a packed batch."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.last = nn.Embedding(17, 11), nn.GRU(11, 7), nn.Linear(7, CLASSES)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        return self.last(self.rnn(packed)[1][-1])
