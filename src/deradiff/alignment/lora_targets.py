"""The layers of a denoiser that LoRAs of alignments are put on, by the endings of their names."""

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention projections, which the published LoRA alignments train."""

WIDER_TARGETS = (*LORA_TARGETS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
"""Feed-forward layers and convolutions as well: small models need them."""

_OF_CAPTIONS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

JOINT_TARGETS = tuple(f"attn.{name}" for name in (*LORA_TARGETS, *_OF_CAPTIONS))
"""The projections of attention over picture and caption together, as Stable Diffusion 3 has them."""

_FEED_FORWARD_OF_CAPTIONS = ("ff_context.net.0.proj", "ff_context.net.2")

WIDER_JOINT_TARGETS = (*JOINT_TARGETS, "ff.net.0.proj", "ff.net.2", *_FEED_FORWARD_OF_CAPTIONS)
"""Feed-forward layers as well."""

WIDEST_TARGETS = (*WIDER_TARGETS, *_OF_CAPTIONS, *_FEED_FORWARD_OF_CAPTIONS)
"""All of these, whether it is a UNet or a transformer."""
