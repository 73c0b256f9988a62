"""The network of OpenAI's improved- and guided-diffusion with their tensor names, in float64, for tests."""

import math

import torch
from torch import nn


class Block(nn.Module):
    """resample: -1 halves the sides before the first convolution, 1 doubles them, 0 leaves them."""

    def __init__(self, inputs, outputs, embedding, scale_shift, resample=0):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs * (1 + scale_shift)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outputs), nn.SiLU(), nn.Identity(), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def resampled(self, x):
        if self.resample < 0:
            return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if self.resample > 0 else x

    def forward(self, x, embedding):
        h = self.in_layers[2](self.resampled(self.in_layers[1](self.in_layers[0](x))))
        e = self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            h = self.out_layers[0](h) * (1 + e[:, : h.shape[1]]) + e[:, h.shape[1] :]
        else:
            h = self.out_layers[0](h + e)
        return self.skip_connection(self.resampled(x)) + self.out_layers[1:](h)


class Attention(nn.Module):
    def __init__(self, channels, heads, new_order):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, _):
        n, c, height, width = x.shape
        rows = self.qkv(self.norm(x).flatten(2))
        outputs = []
        for i in range(self.heads):  # the rows of head i's q, k and v
            size = c // self.heads
            starts = [part * c + i * size if self.new_order else (3 * i + part) * size for part in range(3)]
            q, k, v = (rows[:, start : start + size] for start in starts)
            weights = (q.transpose(1, 2) @ k / math.sqrt(size)).softmax(-1)
            outputs.append(v @ weights.transpose(1, 2))
        return x + self.proj_out(torch.cat(outputs, 1)).reshape(n, c, height, width)


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, _):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, _):
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class OpenAIUNet(nn.Module):
    """attention: the levels that have it. heads: a number, or a function of the width."""

    def __init__(
        self, channels, multipliers, blocks, attention, *, stem=None, outputs=3, heads=4, new_order=False,
        scale_shift=True, updown=False, classes=None,
    ):  # fmt: skip
        super().__init__()
        self.channels = channels
        embedding, widths = 4 * channels, [int(channels * m) for m in multipliers]

        def block(inputs, outputs, resample=0):
            return Block(inputs, outputs, embedding, scale_shift, resample)

        def attend(width):
            return Attention(width, heads(width) if callable(heads) else heads, new_order)

        self.time_embed = nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if classes:
            self.label_emb = nn.Embedding(classes, embedding)
        width = stem or channels
        skips = [width]
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, width, 3, padding=1)])])
        for level, out in enumerate(widths):
            for _ in range(blocks):
                layers = [block(width, out)] + ([attend(out)] if level in attention else [])
                self.input_blocks.append(nn.ModuleList(layers))
                width = out
                skips.append(width)
            if level + 1 < len(widths):
                self.input_blocks.append(nn.ModuleList([block(width, width, -1) if updown else Down(width)]))
                skips.append(width)
        self.middle_block = nn.ModuleList([block(width, width), attend(width), block(width, width)])
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                layers = [block(width + skips.pop(), out)] + ([attend(out)] if level in attention else [])
                width = out
                if level and i == blocks:
                    layers.append(block(width, width, 1) if updown else Up(width))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, outputs, 3, padding=1))

    def forward(self, x, t, labels=None):
        half = self.channels // 2
        angles = t.double()[:, None] * 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
        embedding = self.time_embed(torch.cat((angles.cos(), angles.sin()), 1))
        if labels is not None:
            embedding = embedding + self.label_emb(labels)
        h = self.input_blocks[0][0](x)
        skips = [h]
        for layers in self.input_blocks[1:]:
            for layer in layers:
                h = layer(h, embedding)
            skips.append(h)
        for layer in self.middle_block:
            h = layer(h, embedding)
        for layers in self.output_blocks:
            h = torch.cat((h, skips.pop()), 1)
            for layer in layers:
                h = layer(h, embedding)
        return self.out(h)
