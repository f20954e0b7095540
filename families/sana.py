"""SANA: see Model in flow_sde.py for what a family overrides."""

from flow_sde import Model, filled


class Sana(Model):
    """SANA. A prompt is read after an instruction, the null prompt without. Euler's steps, not its DPM's."""

    defaults = Model.defaults | dict(resolution="its own", guidance=4.5, max_sequence_length=300)
    takes, even_grid, null_options = (0, 1), False, dict(complex_human_instruction=None)
    attention = "attn[12]"

    @classmethod
    def flag_defaults(cls, index, config):
        return cls.defaults | dict(resolution=32 * config["sample_size"])

    def euler_scheduler(self):
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = self.pipe.scheduler.config
        if config.get("prediction_type") != "flow_prediction":
            return super().euler_scheduler()
        return FlowMatchEulerDiscreteScheduler.from_config(config, shift=config.flow_shift)

    def net(self, network, x, t, embeds, mask):
        time = filled(x, t * self.scheduler.config.num_train_timesteps * network.config.timestep_scale)
        return network(x, embeds, time, encoder_attention_mask=mask, return_dict=False)[0]
