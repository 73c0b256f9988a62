"""diffusers' ResnetBlock2D with its norms and SiLUs in one kernel each; `fastddpm.fuse_norms` puts it in place."""

from __future__ import annotations

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ..fused_norms import norm_silu, plain, weighted


class FusedResnetBlock2D(ResnetBlock2D):
    """ResnetBlock2D by `ops.group_norm_silu`; what of it somebody has replaced or hooked runs as diffusers runs it."""

    @staticmethod
    def fits(block: ResnetBlock2D) -> bool:
        """Whether its norms and nonlinearity are what the fused forward takes them for."""
        norms = block.norm1, block.norm2
        return (
            all(plain(norm, nn.GroupNorm) and weighted(norm) for norm in norms)
            and plain(block.nonlinearity, nn.SiLU)
            and block.time_embedding_norm in ("default", "scale_shift")
        )

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args, **kwargs) -> torch.Tensor:
        usual = (temb is None) == (self.time_emb_proj is None) and (
            temb is not None or self.time_embedding_norm == "default"
        )
        if args or kwargs or not usual or not self.fits(self):
            return super().forward(input_tensor, temb, *args, **kwargs)
        x, h = input_tensor, norm_silu(self.norm1, input_tensor)
        resample = self.upsample or self.downsample
        if resample is not None:
            if self.upsample is not None and len(x) >= 64:  # as diffusers does, for torch's kernel of upsampling
                x, h = x.contiguous(), h.contiguous()
            x, h = resample(x), resample(h)
        h = self.conv1(h)
        given = {}
        if temb is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "default":
                given["add"] = temb
            else:
                given["scale"], given["shift"] = temb.chunk(2, dim=1)
        h = self.conv2(self.dropout(norm_silu(self.norm2, h, **given)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return (x + h) / self.output_scale_factor
