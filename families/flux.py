"""FLUX.1 and FLUX.2: see Model in flow_sde.py for what a family overrides."""

import math

import torch

from flow_sde import Model, filled


class Flux(Model):
    """FLUX.1: dev takes guidance as an input (embedded guidance), schnell has none."""

    defaults = Model.defaults | dict(guidance=3.5)
    distilled_defaults = dict(guidance=1.0, max_sequence_length=256)
    takes, packed = (0, 1), True

    @classmethod
    def distilled(cls, index, config):
        return not config.get("guidance_embeds")

    def net(self, network, x, t, embeds, pooled, guidance=None):
        n = torch.arange(math.isqrt(x.shape[1]), device=x.device)
        places = torch.cartesian_prod(n[:1], n, n)  # of the picture's tokens; those of the words are all 0
        words = places.new_zeros(embeds.shape[1], 3)
        return network(x, embeds, pooled, filled(x, t), places, words, guidance, return_dict=False)[0]


class Flux2(Model):
    """FLUX.2: klein's base is guided, klein itself was distilled; dev takes guidance as an input."""

    packed = True

    @classmethod
    def distilled(cls, index, config):
        return index.get("is_distilled", False)

    def net(self, network, x, t, embeds, guidance=None):
        n, words = (torch.arange(k, device=x.device) for k in (math.isqrt(x.shape[1]), embeds.shape[1]))
        zero = n[:1]
        places, words = torch.cartesian_prod(zero, n, n, zero), torch.cartesian_prod(zero, zero, zero, words)
        return network(x, embeds, filled(x, t), places, words, guidance, return_dict=False)[0]

    def mu(self, tokens, num_steps):
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(tokens, num_steps)

    def to_vae(self, latents):
        side, norm = math.isqrt(latents.shape[1]), self.pipe.vae.bn
        std = (norm.running_var + self.pipe.vae.config.batch_norm_eps).sqrt()
        latents = (latents * std + norm.running_mean).mT.unflatten(2, (side, side))
        return self.pipe._unpatchify_latents(latents)
