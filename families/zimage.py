"""Z-Image: see Model in flow_sde.py for what a family overrides."""

import torch

from flow_sde import Model, filled


class ZImage(Model):
    """Z-Image: takes lists, of texts of any length, counts t from the other end and returns -v. Turbo is not
    to be guided, which its files do not say; the base is. The pipeline's guidance_scale is one less."""

    defaults = Model.defaults | dict(guidance=1.0)
    attention = "attention"

    def net(self, network, x, t, embeds):
        time = (1000 - filled(x, 1000 * t)) / 1000  # rounded as the pipeline does
        v = network(list(x.unsqueeze(2)), time, embeds, return_dict=False)[0]
        return -torch.stack(v).squeeze(2)
