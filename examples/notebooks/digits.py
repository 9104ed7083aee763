# %% [markdown]
# # The digits in ten minutes
#
# An aligned diffusion model was trained at one strength β of the penalty that ties it to its reference. deradiff
# turns that strength while sampling: one dial, λ, where 0 is the reference, 1 the aligned model (the *anchor*), and
# in between lies what a model aligned at β/λ would draw, approximately and without training.
#
# This notebook turns it on a model that ships with the package: a small but complete Stable Diffusion of handwritten
# digits. No GPU and no download; all of it takes a minute or so.

# %%
import matplotlib.pyplot as plt
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

import deradiff
from deradiff.baking.drawing import Sampler
from deradiff.worlds import digits
from deradiff.worlds.digits.classifier import read
from deradiff.worlds.digits.rewards import DigitsReward


def show(rows, across, down=("",)):
    """Pictures in a grid, with a word above each column and beside each row."""
    _, axes = plt.subplots(len(rows), len(across), figsize=(1.1 * len(across), 1.2 * len(rows)), squeeze=False)
    for places, images, word in zip(axes, rows, down, strict=True):
        for axis, image in zip(places, images, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        places[0].set_ylabel(word, fontsize=8)
    for axis, label in zip(axes[0], across, strict=True):
        axis.set_title(label, fontsize=9)
    plt.tight_layout()
    plt.show()


# %% [markdown]
# ## A pipeline and an anchor
#
# `pipe` is an ordinary `StableDiffusionPipeline`. Its anchors were aligned by Diffusion-DPO to a reward that likes
# bold ink and vivid colours, at six strengths. We take one that went too far.

# %%
pipe = digits.load_pipeline()
print("anchors at β =", digits.BETAS)
beta = 100.0


def draw(prompt="a red seven", count=1, **settings):
    """So many pictures of a prompt, all from the same noise."""
    same = [torch.Generator().manual_seed(1) for _ in range(count)]
    settings = {"num_inference_steps": 25, "guidance_scale": digits.GUIDANCE} | settings
    return pipe([prompt] * count, generator=same, **settings).images


plain = draw()[0]

# %% [markdown]
# ## Sweep λ
#
# One call realigns the pipeline; it is used as before. λ may be a list, with one value for each image of the batch.

# %%
dial = deradiff.realign(pipe, digits.anchor_path(beta))
lams = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
dial.lam = lams
sweep = draw(count=len(lams))
show([sweep], [f"λ = {lam:g}" for lam in lams])
assert sweep[0].tobytes() == plain.tobytes()  # λ = 0 is the reference, bit for bit

# %% [markdown]
# From left to right the stroke gets bolder. Beyond λ = 1 lies what nobody trained: an extrapolation, and soon an
# over-optimised one. If you think in strengths, ask for one; 400 is four times the anchor's β, so λ is a quarter:

# %%
dial.lam = deradiff.lam_for_beta(anchor_beta=beta, target_beta=400)
print("λ =", dial.lam)

# %% [markdown]
# ## λ that grows along the way
#
# Early steps decide what the picture is, late ones how it looks. Annealed importance guidance leaves the early ones
# to the reference: λ(s) = s² from noise (s = 0) to image (s = 1). An entry of the list may be such a schedule.

# %%
dial.lam = [0, 0.5, deradiff.schedules.Power(2), deradiff.schedules.Step(0.5), 1]
show([draw(count=5)], ["reference", "λ = ½", "s²", "second half", "anchor"])

# %% [markdown]
# ## The price
#
# Every step evaluates both models. With a tolerance it does so only where that is needed, and says what it did: here
# the error may be 5% of λ's own effect, and a model with interpolated weights carries on in between.

# %%
dial.lam = 0.5
exact = draw(num_inference_steps=50)[0]
dial.reuse = deradiff.Reuse(tolerance=0.05, carrier="interpolate")
cheaper = draw(num_inference_steps=50)[0]
print(dial.reused.words)
dial.reuse = None
show([[exact, cheaper]], ["exact", "cheaper"])

# %% [markdown]
# ## Can it be trusted?
#
# Each step is exact; the run as a whole leaves out a factor, which is known and costs nothing. So every image has a
# weight, and for any score of yours a verdict says how far its mean is off. Weights compare images of one prompt,
# from a sampler with noise of its own, without guidance.

# %%
ordinary = pipe.scheduler
pipe.scheduler = DDPMScheduler.from_config(ordinary.config)
prompt, count = "the digit five", 32
settings = {"num_images_per_prompt": count, "num_inference_steps": 25, "guidance_scale": 1.0}


def sample(lam):
    """Pictures at one λ from the same noise as at any other, and the reward of each."""
    dial.lam = lam
    images = pipe(prompt, generator=torch.Generator().manual_seed(2), **settings).images
    return images, DigitsReward()(images, [prompt] * count)


_, reference = sample(0)
images, scores = sample(0.5)
print(f"mean reward: {float(reference.mean()):.2f} at λ = 0, {float(scores.mean()):.2f} at λ = ½")
print(dial.verdict(scores, baseline=float(reference.mean())).words)

# %% [markdown]
# Where the plain samples are off, particles put the factor back: sixteen of them walk through the pipeline as one
# batch, and heavy ones displace light ones on the way.
#
# Both go by the anchor's predictions, and so hold for an anchor that is its reference tilted by a reward. Anchors of
# Diffusion-DPO need not be: on the digits the plain samples came nearer to models that were trained at β/λ. `deradiff
# examine` finds out of which kind an anchor is.

# %%
swarm = deradiff.sample_particles(
    pipe, prompt, 16, num_inference_steps=25, guidance_scale=1.0, generator=torch.Generator().manual_seed(3)
)
print(swarm.words)
show([swarm.images[:8], swarm.images[8:]], [""] * 8, ["", ""])
pipe.scheduler = ordinary

# %% [markdown]
# ## Find λ by eye
#
# The same noise for every λ and prompt, and beneath it two numbers: the reward, and how many of these digits a
# classifier reads that was trained on real handwriting. The reward grows on and on; what it was made for does not.
# Four pictures settle nothing, of course: `deradiff search` does this with as many as it takes, and tells how sure it
# is.

# %%
prompts = {
    "a handwritten three": 3,
    "a red seven": 7,
    "a five on yellow paper": 5,
    "a blue eight on white paper": 8,
}
dial.lam = lams = [0, 0.5, 1, 1.5, 2]
rows = [draw(words, count=len(lams)) for words in prompts]
show(rows, [f"λ = {lam:g}" for lam in lams], [words.removeprefix("a ").split(" on ")[0] for words in prompts])

for lam, column in zip(lams, zip(*rows, strict=True), strict=True):
    reward = DigitsReward()(list(column), list(prompts)).mean()
    pixels = torch.stack([torch.tensor(list(image.tobytes())).view(32, 32, 3) for image in column]) / 255
    legible = (read(pixels.permute(0, 3, 1, 2)).digits == torch.tensor(list(prompts.values()))).sum()
    print(f"λ = {lam:<4g}  reward {float(reward):5.2f}   legible {int(legible)} of {len(prompts)}")

# %% [markdown]
# ## Keep it
#
# A chosen λ can be baked into one ordinary checkpoint, which costs what the plain model costs and loads without
# deradiff. The quick way interpolates the weights, and measures how near its images come to the realigned ones.

# %%
dial.remove()
assert draw()[0].tobytes() == plain.tobytes()  # the pipeline is what it was

sampler = Sampler(guidance_scale=digits.GUIDANCE)
baked = deradiff.bake(
    pipe, digits.anchor_path(beta), 0.5, "digits-half", prompts=list(prompts), images=4, sampler=sampler, force=True
)
print(baked.judgements[0].words)

pipe = StableDiffusionPipeline.from_pretrained("digits-half")
pipe.set_progress_bar_config(disable=True)
show([[sweep[0], sweep[2], draw()[0], sweep[4]]], ["reference", "λ = ½", "baked", "anchor"])

# %% [markdown]
# ## Next
#
# The same on your model: `sdxl.ipynb` beside this one, and the documentation's pages on realigning a pipeline, on the
# verdict and on searching for λ.
