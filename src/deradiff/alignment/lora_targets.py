"""The layers of a denoiser that LoRAs of alignments are put on, by the endings of their names."""

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention projections, which the published LoRA alignments train."""

WIDER_TARGETS = (*LORA_TARGETS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
"""Feed-forward layers and convolutions as well: small models need them."""
