"""`deradiff examine`: what kind of anchor is it, and what do weights of its samples mean?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from deradiff.cli import arguments, options, terminal
from deradiff.cli.options import model_option, output_option, sampling_option

if TYPE_CHECKING:
    from deradiff.examination import Examination


def examine(
    context: arguments.Context,
    reference: options.Reference,
    anchor: options.Anchor,
    reward: Annotated[
        str | None,
        model_option(help="What the anchor was aligned with, as for `align`; known where `align` made it."),
    ] = None,
    data: Annotated[
        str | None,
        model_option(help="Preference pairs, as for `align`; without, the reference's images compared by the reward."),
    ] = None,
    aligned_by: Annotated[
        str | None, model_option(help="The method of its alignment (dpo, rwr, draft, ...), if no record tells.")
    ] = None,
    anchor_beta: Annotated[float | None, model_option(help="Its β, of Diffusion-DPO, if no record tells.")] = None,
    prompt: options.Prompt = None,
    prompts: Annotated[
        str | None, sampling_option(help="A file of prompts, or a list by name; the digits have their own.")
    ] = None,
    images: Annotated[int, sampling_option(min=8, help="Images of every prompt at each of five λ.")] = 24,
    seed: Annotated[int, sampling_option(min=0, help="Of the first image.")] = 0,
    scheduler: options.Scheduler = None,
    steps: options.Steps = 25,
    guidance_scale: options.GuidanceScale = 1.0,
    height: options.Side = None,
    width: options.Side = None,
    batch_size: options.BatchSize = 60,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    offload: options.Offload = False,
    revision: options.Revision = None,
    anchor_revision: options.AnchorRevision = None,
    allow_pickle: options.AllowPickle = False,
    out: Annotated[
        Path, output_option("--out", "-o", help="A new JSON file for what was found; a plot goes beside it.")
    ] = Path("character.json"),
    force: Annotated[bool, output_option("--force", help="Replace the files that are there.")] = False,
) -> None:
    """Find out what kind of anchor it is: a tilt of its reference, stepwise, or neither. Verdicts depend on it.

    Sampling is by ddpm, for flows by flow-sde, if no scheduler is named.
    """
    with terminal.refusing_wrong_input():
        (source,) = _single(arguments.anchors(anchor)).values()
        terminal.require_writable("--out", out)
        plot = out.with_suffix(".png")
        if not force and (present := [str(path) for path in (out, plot) if path.exists()]):
            raise FileExistsError(f"{' and '.join(present)} exist: name another --out, or give --force")
        texts = arguments.prompts(prompt or (), prompts) if prompt or prompts else ()
        with terminal.progress("examining") as on_progress:
            from deradiff.examination import examine as examined
            from deradiff.sweep.settings import Settings

            chosen: dict[str, Any] = arguments.values(context, Settings.model_fields)
            for name in ("reference", "prompts", "anchor_beta"):
                chosen.pop(name, None)
            found = examined(
                reference,
                source,
                reward=reward,
                data=data,
                aligned_by=aligned_by,
                anchor_beta=anchor_beta,
                prompts=texts,
                images=images,
                seed=seed,
                on_progress=on_progress,
                **chosen,
            )
            found.save(out)
            found.plot(plot)
    _print(found)
    terminal.files([out, plot])


def _single(anchors: dict[str, str]) -> dict[str, str]:
    if len(anchors) != 1:
        raise ValueError(f"{len(anchors)} anchors were given: examine one at a time")
    return anchors


def _print(found: "Examination") -> None:
    """The numbers of both tests, and what they come to."""
    from rich.table import Table

    console = terminal.LiteralConsole(soft_wrap=True)
    if (tilt := found.tilt) is not None:
        table = Table("λ", "plain", "weighted", "a tilt's", "slope, nats per point", "effective")
        for one in tilt.at:
            slope = "" if one.slope is None else str(one.slope)
            means = (f"{x.value:.0%} ± {x.error:.0%}" for x in (one.plain, one.weighted))
            table.add_row(f"{one.lam:g}", *means, f"{one.expected:.0%}", slope, f"{one.effective:.0%}")
        console.print(table)
        console.print(f"Mean reward on the way from reference to anchor, {tilt.shift} points; ± one standard error.")
        console.print(f"A tilt by this reward? {tilt.answer}: {tilt.why}.")
    if (pairs := found.pairs) is not None:
        shares = ", ".join(f"{one} at λ = {lam:g}" for lam, one in pairs.proportions.items())
        console.print(f"Pairs: s(β/λ)/(λ s(β)) is {shares}; s(β) = {pairs.strength}; {pairs.pairs} pairs.")
        console.print(f"Stepwise? {pairs.answer}: {pairs.why}.")
    console.print(f"The anchor is {found.character.words}.")
