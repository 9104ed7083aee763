"""`deradiff align`: one anchor per strength, from a base and what it is to prefer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from deradiff.cli import arguments, options, terminal
from deradiff.cli.options import machine_option, panel

if TYPE_CHECKING:
    from deradiff.alignment.settings import Preset

model_option, data_option = panel("Model"), panel("Data")
reward_option, training_option = panel("Reward and sampling"), panel("Training")


def align(
    context: arguments.Context,
    base: Annotated[
        str | None,
        typer.Argument(help="The model to align: a folder, a hub id, or `digits` or `digits-flow`, which ship."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the anchors. An interrupted alignment goes on where it was.")
    ] = Path("aligned"),
    beta: Annotated[str | None, training_option("--beta", help="Strengths, one anchor each: 500,1000,2000.")] = None,
    method: Annotated[
        Literal["dpo", "mapo", "draft", "alignprop", "refl", "rwr", "ddpo", "flow-grpo", "diffusion-nft"] | None,
        training_option(help="How to align; the preset's, or dpo."),
    ] = None,
    preset: Annotated[
        str | None, training_option(help="Published hyperparameters to start from; every option overrides one.")
    ] = None,
    show_preset: Annotated[
        str | None, training_option(help="Print a preset, or `all`, and stop.", metavar="NAME")
    ] = None,
    data: Annotated[
        str | None,
        data_option(
            help="Preference pairs for dpo and mapo: a folder, Parquet, pickapic-v1, pickapic-v2, a hub dataset. "
            "Prompts for the others: a file, partiprompts, hpdv2, pickapic-v1, ... `own`: the digits' own."
        ),
    ] = None,
    count: Annotated[
        int | None,
        data_option(
            "--count", min=1, help="Use so many pairs or prompts of the data; of the digits' own, 2,000 or 500."
        ),
    ] = None,
    cache: Annotated[
        bool, data_option("--cache/--no-cache", help="Encode all pairs once, beforehand, or anew in every step.")
    ] = True,
    flip: Annotated[
        bool, data_option("--flip/--no-flip", help="dpo, mapo: mirror pictures by chance, in a cache once.")
    ] = False,
    resolution: Annotated[int | None, data_option(min=8, help="Side of the pictures.")] = None,
    held_out: Annotated[
        int | None, data_option(min=1, help="Pairs, prompts or samples that only measure progress.")
    ] = None,
    reward: Annotated[
        str | None,
        reward_option(
            help="What the methods without pairs maximise: pickscore, hps-v2.0, hps-v2.1, clip, aesthetic, "
            "image-reward, with =FOLDER for local weights; digits, bold, ink, legible, colours for the digits."
        ),
    ] = None,
    keep: Annotated[
        int | None, reward_option(min=1, help="draft: gradients go through so many of the last steps.")
    ] = None,
    window: Annotated[
        str | None,
        reward_option(
            help="A number of steps drawn from FIRST to LAST: refl stops sampling after it, alignprop's gradients go "
            "through the last so many.",
            metavar="FIRST,LAST",
        ),
    ] = None,
    ceiling: Annotated[float | None, reward_option(help="refl: rewards above this count as this, in points.")] = None,
    reward_scale: Annotated[
        float | None,
        reward_option(
            help="Multiplies the reward that λ_KL is weighed against; 100 is a CLIP model's logit scale. flow-grpo and "
            "diffusion-nft weigh it against advantages, whatever the scale."
        ),
    ] = None,
    reward_dropout: Annotated[
        float | None, reward_option(min=0, max=0.999, help="Share of the reward's parameters at zero in each call.")
    ] = None,
    pretraining: Annotated[
        float | None,
        reward_option(min=0, help="refl: add the denoising loss of the model's own samples, so many times."),
    ] = None,
    per_prompt: Annotated[
        int | None,
        reward_option(min=2, help="rwr, ddpo, flow-grpo, diffusion-nft: samples of every prompt."),
    ] = None,
    updates: Annotated[
        int | None,
        reward_option(min=1, help="flow-grpo, diffusion-nft: training steps on what one old policy draws."),
    ] = None,
    clip: Annotated[
        float | None, reward_option(help="flow-grpo: how far a ratio of probabilities may be from 1.")
    ] = None,
    mixing: Annotated[
        float | None, reward_option(help="diffusion-nft: the step from the old to the implicit policy, its β.")
    ] = None,
    memory: Annotated[
        str | None,
        reward_option(
            help="diffusion-nft: from step FIRST on the old policy keeps RATE more of itself with every step, up to "
            "MOST.",
            metavar="FIRST,RATE,MOST",
        ),
    ] = None,
    eta: Annotated[
        float | None, reward_option(help="flow-grpo, ddpo by ddim: the noise of each step, above 0; 1 is memoryless.")
    ] = None,
    sampling_steps: Annotated[int | None, reward_option(min=1, help="Steps of the sampler in training.")] = None,
    guidance_scale: Annotated[float | None, reward_option(min=1, help="Guidance of the sampler in training.")] = None,
    lora_rank: Annotated[int | None, model_option(min=0, help=options.LORA_RANK)] = None,
    steps: Annotated[int | None, training_option(min=1, help="Training steps.")] = None,
    batch: Annotated[int | None, training_option(min=1, help="Pairs, prompts or samples per step, in all.")] = None,
    accumulate: Annotated[int | None, training_option(min=1, help="Micro-batches per step and process.")] = None,
    learning_rate: Annotated[float | None, training_option(help="Peak rate.")] = None,
    warmup: Annotated[int | None, training_option(min=0, help="Steps of warm-up.")] = None,
    schedule: Annotated[
        Literal["constant", "cosine"] | None, training_option(help="The rate after the warm-up.")
    ] = None,
    optimizer: Annotated[
        Literal["adamw", "adamw8bit", "adafactor"] | None, training_option(help="adamw8bit needs bitsandbytes.")
    ] = None,
    ema: Annotated[
        float | None,
        training_option(
            min=0, max=0.999999, help="Keep this moving average of the weights; 0: the weights themselves."
        ),
    ] = None,
    density: Annotated[
        Literal["uniform", "logit-normal"] | None,
        training_option(help="dpo, rwr, refl: how the times of a flow are spread in training; uniform by default."),
    ] = None,
    seed: options.TrainingSeed = 0,
    precision: Annotated[Literal["no", "fp16", "bf16"] | None, machine_option(help="Mixed precision.")] = None,
    gradient_checkpointing: Annotated[
        bool, machine_option("--gradient-checkpointing", help=options.GRADIENT_CHECKPOINTING)
    ] = False,
    track: Annotated[Literal["tensorboard", "wandb"] | None, machine_option(help="Follow the curves.")] = None,
    cpu: Annotated[bool, machine_option("--cpu", help="Train on the processor.")] = False,
    dry_run: Annotated[
        bool,
        machine_option(
            "--dry-run", help="Load models and data, try one step of a small model of the class, and write nothing."
        ),
    ] = False,
) -> None:
    """Align a model, once per strength: anchors that λ then turns.

    dpo, mapo: preference pairs. draft, alignprop, refl: the gradient of a reward. rwr: the model's own samples,
    weighted by a reward. ddpo: policy gradients, for rewards without a gradient; flow-grpo and diffusion-nft are that
    for flow matching.

    Each anchor is OUT/beta-β: weights, a model card, the curve. On several GPUs or nodes: accelerate launch -m deradiff
    align ..., with Accelerate's own configuration.
    """
    console = terminal.LiteralConsole()
    spare = (
        "add --gradient-checkpointing, raise --accumulate, which makes micro-batches smaller, lower --resolution, or "
        "train a LoRA (--lora-rank 64)"
    )
    with terminal.refusing_wrong_input(out_of_memory=spare):
        if show_preset:
            _show(show_preset)
            return
        if preset is None and base is None:
            raise ValueError("name the model to align, a folder or a hub id, or --preset; `digits` ships with deradiff")
        with console.status("Loading torch and diffusers …"):
            terminal.pass_on_warnings()
            from deradiff.alignment import runs

            own = arguments.given(
                context,
                *("keep", "ceiling", "reward_scale", "reward_dropout", "pretraining", "per_prompt"),
                *("updates", "clip", "mixing"),
            )
            own |= {} if window is None else {"window": _window(window)}
            own |= {} if memory is None else {"memory": _memory(memory)}
            sampling = {"steps": sampling_steps, "guidance_scale": guidance_scale, "eta": eta}
            settings = _settings(context, preset, base, schedule)
            settings = _for_method(settings, own, {name: x for name, x in sampling.items() if x is not None})
            betas = _strengths(beta, settings)
        if dry_run:
            for line in runs.rehearsed(settings, count=count, seed=seed, cpu=cpu):
                terminal.echo(line)
            return
        with terminal.stages(console) as report:
            anchors = runs.align_all(settings, betas, out, report, count=count, seed=seed, track=track, cpu=cpu)
    terminal.files(anchors)


def _show(name: str) -> None:
    import yaml

    from deradiff.alignment.presets import PRESETS
    from deradiff.alignment.presets import preset as called

    chosen = PRESETS if name == "all" else {name: called(name)}
    shown = {key: _plain(value.shown()) for key, value in chosen.items()}
    terminal.echo(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=100), nl=False)


def _plain(content: Any) -> Any:
    """Tuples as lists: YAML has no tuples. Everything a copy: YAML writes what occurs twice as an alias."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    return [_plain(value) for value in content] if isinstance(content, list | tuple) else content


def _settings(context: arguments.Context, name: str | None, base: str | None, schedule: str | None) -> "Preset":
    """The preset with every option that was given in its place."""
    from dataclasses import replace

    from deradiff.alignment.presets import preset as called
    from deradiff.alignment.presets import usual
    from deradiff.worlds import find

    given = arguments.given
    wanted = given(context, "method", "data", "reward", "resolution", "held_out", "lora_rank", "batch", "precision")
    wanted |= given(context, "gradient_checkpointing", "cache", "flip", "density")
    plan = given(context, "steps", "accumulate", "learning_rate", "warmup", "optimizer")
    if average := given(context, "ema"):
        plan["average"] = average["ema"]
    method = wanted.get("method")
    start = called(name) if name else usual(base, method or "dpo")
    paired = start.method in ("dpo", "mapo")
    if method not in (None, start.method):
        raise ValueError(f"the preset {name} is for {start.method}; --method {method} has other settings")
    if name is None and not find(base):
        asked = {"data": wanted, "resolution": wanted, "batch": wanted, "steps": plan, "learning_rate": plan}
        asked |= {} if paired else {"reward": wanted}
        missing = [f"--{key.replace('_', '-')}" for key, known in asked.items() if key not in known]
        if missing:
            raise ValueError(f"without --preset nothing is known of {base}: name {', '.join(missing)} as well")
    nothing = {"data": start.data or wanted.get("data"), "reward": paired or start.reward or wanted.get("reward")}
    if missing := [f"--{key}" for key, known in nothing.items() if not known]:
        raise ValueError(f"the preset {name} leaves open what is its user's own: name {' and '.join(missing)} as well")
    if wanted.get("reward") not in (None, start.reward):
        # The ceiling is in points of the preset's own reward.
        start = replace(start, options={key: value for key, value in start.options.items() if key != "ceiling"})
    if (world := find(start.base)) and wanted.get("resolution", world.resolution) != world.resolution:
        raise ValueError(f"{world.title} have {world.resolution} pixels a side: leave --resolution out")
    if not paired and (useless := {"cache", "flip"} & wanted.keys()):
        given_as = ", ".join(f"--{'' if wanted[name] else 'no-'}{name}" for name in sorted(useless))
        raise ValueError(f"{given_as}: {start.method} has no pairs")
    if paired and wanted.get("data", start.data) != "own":
        wanted.setdefault("reward", None)
    if "lora_rank" in wanted:
        wanted["lora_rank"] = wanted["lora_rank"] or None
    if "learning_rate" in plan:
        wanted["rate_times_beta"] = None
    changed = replace(start.plan, **plan)
    if changed.cosine:
        changed = replace(changed, cosine=changed.steps)
    if schedule:
        changed = replace(changed, cosine=changed.steps if schedule == "cosine" else None)
    return replace(start, **wanted, plan=changed, base=base or start.base)


def _window(text: str) -> tuple[int, int]:
    try:
        first, last = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--window {text}: name two numbers of steps, such as 30,39") from None
    return first, last


def _memory(text: str) -> tuple[int, float, float]:
    try:
        first, rate, most = (kind(part) for kind, part in zip((int, float, float), text.split(","), strict=True))
    except ValueError:
        raise ValueError(f"--memory {text}: name a step and two numbers, such as 0,0.001,0.5") from None
    from deradiff.alignment.diffusion_nft import ramp

    ramp(first, rate, most)
    return first, rate, most


def _for_method(settings: "Preset", own: dict[str, Any], sampling: dict[str, Any]) -> "Preset":
    """`settings` with the options of its method and of its sampler in place."""
    from dataclasses import replace

    names = {*settings.options, *(["ceiling"] if settings.method == "refl" else [])}
    strange = [name for name in own if name not in names]
    if strange:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in strange)
        known = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names)) or "no such options"
        raise ValueError(f"{given}: not for {settings.method}, which has {known}")
    settings = replace(settings, options=settings.options | own, sampling=settings.sampling | sampling)
    if "eta" in sampling:
        _require_noise(settings)
    if settings.density and settings.method not in NOISING:
        raise ValueError(f"--density: {settings.method} draws no times of its own; {', '.join(NOISING)} do")
    return settings


NOISING = ("dpo", "rwr", "refl")
"""The methods that noise pictures at times that they draw."""


def _require_noise(settings: "Preset") -> None:
    """Raise `ValueError` for an eta that is out of range, or that the sampler of `settings` has no use for."""
    from deradiff.alignment.sampling import SamplerSettings

    scheduler = SamplerSettings(**settings.sampling).scheduler
    if scheduler != "flow-sde" and (settings.method, scheduler) != ("ddpo", "ddim"):
        raise ValueError(f"--eta: {settings.method} by {scheduler} takes steps whose noise is not set")


def _strengths(text: str | None, settings: "Preset") -> list[float]:
    if text is None:
        if not settings.betas:
            raise ValueError("name the strengths to align at: --beta 500,1000,2000")
        return list(settings.betas)
    try:
        betas = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--beta {text}: name one or more numbers, separated by commas") from None
    from deradiff.alignment.methods import METHODS

    method = METHODS[settings.method]
    wrong = [value for value in betas if not 0 <= value < float("inf") or (value == 0 and not method.may_be_zero)]
    if wrong:
        least = "0 or more" if method.may_be_zero else "positive"
        raise ValueError(f"--beta {text}: {wrong[0]:g} is no strength; {method.symbol} must be {least} and finite")
    return list(dict.fromkeys(betas))
