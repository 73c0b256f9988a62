"""Ho et al.'s network with the tensor names of pytorch_diffusion, in float64, for tests. Written from the paper."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs, outputs, embedding):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, inputs, eps=1e-6), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.temb_proj = nn.Linear(embedding, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(32, outputs, eps=1e-6), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, embedding):
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(embedding))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k / math.sqrt(x.shape[1])).softmax(-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).reshape(x.shape))


def level(pairs, attention, embedding):
    made = nn.Module()
    made.block = nn.ModuleList(Block(i, o, embedding) for i, o in pairs)
    made.attn = nn.ModuleList(Attention(o) for _, o in pairs if attention)
    return made


class Resample(nn.Module):
    def __init__(self, channels, stride):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=int(stride == 1))

    def forward(self, x):
        if self.stride == 1:
            return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class PesserUNet(nn.Module):
    """attention: the level that has it, where images have a side of 16."""

    def __init__(self, channels, multipliers, blocks, attention):
        super().__init__()
        self.channels = channels
        embedding, widths = 4 * channels, [channels * m for m in multipliers]
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(channels, embedding), nn.Linear(embedding, embedding)])
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down, ups, skips, width = nn.ModuleList(), [], [channels], channels
        for i, out in enumerate(widths):
            self.down.append(level([(width, out)] + [(out, out)] * (blocks - 1), i == attention, embedding))
            skips += [out] * blocks
            if i + 1 < len(widths):
                self.down[i].downsample = Resample(out, 2)
                skips.append(out)
            width = out
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1 = Block(width, width, embedding), Attention(width)
        self.mid.block_2 = Block(width, width, embedding)
        for i, out in reversed(list(enumerate(widths))):
            pairs = []
            for _ in range(blocks + 1):
                pairs.append((width + skips.pop(), out))
                width = out
            ups.insert(0, level(pairs, i == attention, embedding))
            if i:
                ups[0].upsample = Resample(out, 1)
        self.up = nn.ModuleList(ups)
        self.norm_out, self.conv_out = nn.GroupNorm(32, width, eps=1e-6), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x, t):
        half = self.channels // 2
        angles = t.double()[:, None] * 10000 ** (-torch.arange(half, dtype=torch.float64) / (half - 1))
        first, second = self.temb.dense
        embedding = second(F.silu(first(torch.cat((angles.sin(), angles.cos()), 1))))
        h = self.conv_in(x)
        skips = [h]
        for made in self.down:
            for j, block in enumerate(made.block):
                h = block(h, embedding)
                h = made.attn[j](h) if len(made.attn) else h
                skips.append(h)
            if hasattr(made, "downsample"):
                h = made.downsample(h)
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, embedding)), embedding)
        for made in reversed(self.up):
            for j, block in enumerate(made.block):
                h = block(torch.cat((h, skips.pop()), 1), embedding)
                h = made.attn[j](h) if len(made.attn) else h
            h = made.upsample(h) if hasattr(made, "upsample") else h
        return self.conv_out(F.silu(self.norm_out(h)))
