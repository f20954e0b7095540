"""Qwen-Image: see Model in flow_sde.py for what a family overrides."""

import math

import torch.nn.functional as F

from flow_sde import Model, filled


class QwenImage(Model):
    """Qwen-Image: classifier-free guidance with per-token norm rescaling."""

    takes, null_prompt, packed, most_tokens = (0, 1), " ", True, 1024

    def net(self, network, x, t, embeds, mask):
        side, more = math.isqrt(x.shape[1]), -embeds.shape[1] % 32  # few lengths, for torch.compile
        embeds, mask = F.pad(embeds, (0, 0, 0, more)), F.pad(mask, (0, more))
        return network(x, embeds, mask, filled(x, t), [[(1, side, side)]] * len(x), return_dict=False)[0]

    def guide(self, v, v_uncond, g):
        guided = super().guide(v, v_uncond, g)
        return guided * (v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def to_vae(self, latents):
        config = self.pipe.vae.config
        mean, std = latents.new_tensor([config.latents_mean, config.latents_std]).view(2, -1, 1, 1, 1)
        return self.unpack(latents) * std + mean  # (B, C, 1, h, w), a video of one frame
