"""ComfyUI nodes: the dial between two models, for the samplers and guiders that ComfyUI has.

ComfyUI's own modules are imported only where it calls. From the bottom up:

    options            what was added to a model's options since
    runs               λ of a run, where a sampler is in it, and the mixture in the terms of denoised latents
    predictions        which models a prediction needs, and what is carried over between steps
    shared_weights     a second model that is the first one and a LoRA
    realigned_model    two models as one that a sampler takes
    checks             what may not be mixed
    nodes              the nodes as plain data, and what each does
    registering        these, as ComfyUI wants to have them
    installing         the folder that ComfyUI loads
"""
