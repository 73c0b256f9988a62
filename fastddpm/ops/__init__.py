"""The fused ops. Each has a reference in plain PyTorch, `<op>_ref`."""

from .ddpm_step import ddpm_step, ddpm_step_, ddpm_step_ref
from .group_norm_silu import group_norm_silu, group_norm_silu_ref
from .philox_normal import philox_normal, philox_normal_ref
from .timestep_embedding import timestep_embedding, timestep_embedding_ref

__all__ = [
    "ddpm_step",
    "ddpm_step_",
    "ddpm_step_ref",
    "group_norm_silu",
    "group_norm_silu_ref",
    "philox_normal",
    "philox_normal_ref",
    "timestep_embedding",
    "timestep_embedding_ref",
]
