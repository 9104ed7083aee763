# %% [markdown]
# # SDXL and its Diffusion-DPO anchor
#
# The dial λ on Stable Diffusion XL: 0 is the reference, 1 the UNet that the authors of Diffusion-DPO published, and
# in between lies what a model aligned at β/λ would draw, approximately and without training.
#
# For a GPU: two UNets of 2.6 billion parameters are in memory, about 5 GB each in half precision, beside text
# encoders and VAE. Both are downloaded on the first run. The notebook is stored without pictures.

# %%
import matplotlib.pyplot as plt
import torch
from diffusers import StableDiffusionXLPipeline

import deradiff

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32


def show(images, words):
    """Pictures side by side, with a word above each."""
    _, axes = plt.subplots(1, len(images), figsize=(3 * len(images), 3.4), squeeze=False)
    for axis, image, label in zip(axes[0], images, words, strict=True):
        axis.imshow(image)
        axis.set(xticks=[], yticks=[], title=label)
    plt.tight_layout()
    plt.show()


# %% [markdown]
# ## Realign
#
# One call; the pipeline is used as before. If memory is short, call `pipe.enable_model_cpu_offload()` in place of
# `.to(device)`: the anchor goes along.

# %%
pipe = StableDiffusionXLPipeline.from_pretrained(
    "stabilityai/stable-diffusion-xl-base-1.0", dtype=dtype, variant="fp16"
).to(device)
dial = deradiff.realign(pipe, "mhdang/dpo-sdxl-text2image-v1", lam=0.5)
print(dial)

# %% [markdown]
# ## Sweep λ
#
# The same noise at every λ, so that pictures differ by λ alone. One image at a time needs the least memory; a list of
# λ, one for each image of a batch, is quicker where it fits.

# %%
prompt = "a typhoon in a teacup, studio photograph"
steps = 30


def draw(lam, seed=0, prompt=prompt):
    """One picture at this λ; equal seeds give equal noise."""
    dial.lam = lam
    noise = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=steps, guidance_scale=5.0, generator=noise).images[0]


lams = [0, 0.25, 0.5, 0.75, 1, 1.25]
sweep = [draw(lam) for lam in lams]
show(sweep, [f"λ = {lam:g}" for lam in lams])

# %% [markdown]
# ## λ that grows along the way
#
# Annealed importance guidance: the reference lays out the picture, the anchor finishes it.

# %%
schedules = {"λ = 1": 1, "s²": deradiff.schedules.Power(2), "the last half": deradiff.schedules.Step(0.5)}
show([draw(lam) for lam in schedules.values()], list(schedules))

# %% [markdown]
# ## Pay less
#
# Exact, every step evaluates both UNets. With a tolerance, what lies between them is carried over between steps as
# long as the error stays below 5% of λ's own effect.

# %%
dial.reuse = deradiff.Reuse(tolerance=0.05)
cheaper = draw(0.5)
print(dial.reused.words)
dial.reuse = None
show([sweep[2], cheaper], ["exact", "cheaper"])

# %% [markdown]
# ## Choose by eye, on several seeds
#
# One picture says little about a λ. With a score of your choice `deradiff search` finds the best one, and tells how
# sure it is.

# %%
for seed in (1, 2):
    show([draw(lam, seed) for lam in (0, 0.5, 1)], ["reference", "λ = ½", "anchor"])

# %% [markdown]
# ## Keep it
#
# A chosen λ as one ordinary checkpoint, by interpolated weights: it costs what plain SDXL costs and loads without
# deradiff. This writes a whole pipeline, as large as the reference. `images=4` measures how near its pictures come to
# the realigned ones.

# %%
dial.remove()  # the pipeline is what it was
prompts = [prompt, "a fox in the snow", "an old lighthouse at dusk", "a bowl of ripe apricots"]
baked = deradiff.bake(pipe, "mhdang/dpo-sdxl-text2image-v1", 0.5, "sdxl-half", prompts=prompts, images=4)
print(baked.judgements[0].words)

half = StableDiffusionXLPipeline.from_pretrained("sdxl-half", dtype=dtype).to(device)
noise = torch.Generator().manual_seed(0)
image = half(prompt, num_inference_steps=steps, guidance_scale=5.0, generator=noise).images[0]
show([sweep[2], image], ["λ = ½", "baked"])
