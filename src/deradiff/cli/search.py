"""`deradiff search`: the λ (or λ of several anchors, power or spline) that a score likes best, in a few evaluations."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deradiff.cli import arguments, options, terminal
from deradiff.cli.options import machine_option, panel, sampling_option

if TYPE_CHECKING:
    from deradiff.search.goals import Goal
    from deradiff.search.spaces import SearchSpace
    from deradiff.sweep.workers import Executor

goal_option, space_option = panel("The goal"), panel("What is searched")


def search(
    context: arguments.Context,
    reference: options.Reference,
    anchor: options.Anchor,
    out: Annotated[Path, typer.Option("--out", "-o", help="The search's folder. One that was begun there goes on.")],
    maximize: Annotated[
        list[str] | None,
        goal_option(
            "--maximize",
            "-m",
            help="A score, or a sum of scores: 'legible - 0.1*bold'. Several have a Pareto set. Besides scores there "
            "are path-kl, recall, vendi and distance.",
        ),
    ] = None,
    minimize: Annotated[list[str] | None, goal_option(help="The same, the smaller the better: path-kl.")] = None,
    require: Annotated[
        list[str] | None, goal_option(help="A condition: 'clip >= reference', 'recall >= 0.6', 'path-kl <= 3'.")
    ] = None,
    undo_hacking: Annotated[
        bool,
        goal_option(
            "--undo-hacking",
            help="Look how far λ can go: the knee of how often the reference is beaten in the one --maximize score "
            "against the drift from it. For anchors trained without KL. Needs 2 seeds of a prompt, better 8.",
        ),
    ] = False,
    held_out: Annotated[str, goal_option(help="Scores, with commas between, that the winner is checked by.")] = "",
    features: Annotated[
        str | None, goal_option(help="An extractor (dinov2, clip, inception, digits) to see diversity by.")
    ] = None,
    neighbours: Annotated[int, goal_option(min=1, help="k of recall.")] = 10,
    weighted: Annotated[
        bool,
        goal_option(
            "--weighted",
            help="Search the retrained model's score, by importance weights. Needs 8 seeds of a prompt, guidance 1.",
        ),
    ] = False,
    nearby: Annotated[
        float | None,
        goal_option(help="With --weighted: also use scores this far from every λ (0.05), estimated from its images."),
    ] = None,
    over: Annotated[
        str,
        space_option(
            help="lam; power, of an annealed λ; or knots:S,S,..., λ of a spline at those places (0 noise, 1 image)."
        ),
    ] = "lam",
    limits: Annotated[
        str | None, space_option("--range", help="LOW:HIGH of λ, at most 0:2 (0:1), or of the power (0.25:5).")
    ] = None,
    box: Annotated[bool, space_option("--box", help="λ of several anchors may sum to more than 1.")] = False,
    evaluations: Annotated[int, space_option(help="Evaluations at most, end points included.")] = 8,
    search_seed: Annotated[int, space_option(min=0, help="Of the search itself.")] = 0,
    prompt: options.Prompt = None,
    prompts: Annotated[
        str | None, sampling_option(help="A file of prompts, a list by name (partiprompts, ...), or digits.")
    ] = None,
    count: Annotated[int | None, sampling_option(min=1, help="So many of --prompts, drawn at random.")] = None,
    seed: options.Seeds = ["0"],  # noqa: B006 (Typer never changes it)
    scheduler: options.Scheduler = None,
    steps: options.Steps = 25,
    guidance_scale: options.GuidanceScale = None,
    negative_prompt: options.NegativePrompt = None,
    height: options.Side = None,
    width: options.Side = None,
    batch_size: options.BatchSize = 8,
    workers: Annotated[
        int | None, machine_option(min=1, help="Processes; one on a GPU, one per processor on a CPU.")
    ] = None,
    device: options.Device = "auto",
    allow_pickle: options.AllowPickle = False,
) -> None:
    """Find the λ that a score likes best: a few evaluations on the same prompts and noise, and a model of the score.

    The folder is an experiment: `deradiff experiment report` shows all of it. It also gets search.png (the posterior of
    the score), sheet.png and search.json. The same command goes on where it was interrupted, and with more
    --evaluations it goes further.
    """
    console = terminal.LiteralConsole(stderr=True)
    with terminal.refusing_wrong_input(), console.status("Loading torch, diffusers and BoTorch …"):
        terminal.pass_on_warnings()
        from deradiff.experiments import executors
        from deradiff.experiments.plan import parse_plan
        from deradiff.sampling.devices import device_called, device_name
        from deradiff.search import summary
        from deradiff.search.loop import SearchState
        from deradiff.search.running import run
        from deradiff.sweep.alignment_records import known_beta
        from deradiff.sweep.description import SamplingSettings
        from deradiff.sweep.workers import cores

    with terminal.refusing_wrong_input(), terminal.stages(console) as report:
        sources = arguments.anchors(anchor)
        if features is None:
            arguments.refuse(context, ["neighbours"], "k of recall, which is measured with --features")
        goal = _goal(maximize or [], minimize or [], require or [], undo_hacking)
        space = _space(over, tuple(sources), limits, box)
        place = device_called(device)
        held = [name.strip() for name in held_out.split(",") if name.strip()]
        sampling = arguments.values(context, SamplingSettings.model_fields)
        plan = parse_plan(
            {
                "name": "search",
                "reference": reference,
                "dtype": "float32" if place == "cpu" else "float16",
                "allow_pickle": allow_pickle,
                "models": {name: {"source": source, "beta": known_beta(source)} for name, source in sources.items()},
                "prompts": {"prompts": _prompts(prompt or [], prompts, count) | {"seeds": seed}},
                "sampling": {"sampling": {name: value for name, value in sampling.items() if value is not None}},
                "methods": [{"method": "reference"}],
                "scores": [*dict.fromkeys([*goal.scores, *held])],
                "features": [features] if features else [],
                "batch_size": batch_size,
                "report": {"neighbours": neighbours},
            },
            "this search",
        )

        def executor() -> "Executor":
            return executors.local(plan, place, 1, workers or (cores() if place == "cpu" else 1))

        def print_evaluation(state: SearchState) -> None:
            console.print(summary.evaluated(space, state))

        outcome = run(
            plan,
            space,
            goal,
            out,
            executor,
            report,
            budget=evaluations,
            seed=search_seed,
            weighted=weighted,
            nearby=nearby,
            about={"device": device_name(place), "threads": 1 if place == "cpu" else None},
            on_evaluation=print_evaluation,
        )
    beta = next(iter(plan.models.values())).beta if len(sources) == 1 else None
    for sentence in summary.sentences(space, goal, outcome, beta):
        terminal.echo(sentence)
    terminal.files(outcome.files)


def _goal(maximize: list[str], minimize: list[str], require: list[str], undo_hacking: bool) -> "Goal":
    """What the options ask for."""
    from deradiff.search.goals import Goal

    if not undo_hacking:
        return Goal.read(maximize, minimize, require)
    if len(maximize) != 1 or minimize or require:
        raise ValueError("--undo-hacking takes the one score that the anchor was trained on, as in --maximize legible.")
    return Goal.undo_hacking(*maximize)


def _prompts(given: list[str], source: str | None, count: int | None) -> dict[str, Any]:
    """The prompts as a plan has them."""
    if bool(given) == (source is not None):
        raise ValueError("prompts are needed, from one place: --prompt, or --prompts with a file or a list by name.")
    if given:
        if count is not None:
            raise ValueError("--count draws from --prompts, and each --prompt is used: leave it out.")
        return {"prompts": list(dict.fromkeys(given))}
    return {"source": source} | ({} if count is None else {"count": count, "draw_seed": 0})


def _space(over: str, anchors: tuple[str, ...], limits: str | None, box: bool) -> "SearchSpace":
    """What `--over`, `--range` and `--box` ask for."""
    from deradiff.search import spaces
    from deradiff.sweep.notation import decimal

    kind, _, rest = over.partition(":")
    if kind not in ("lam", "power", "knots") or (rest and kind != "knots"):
        raise ValueError(f"--over {over!r} is unknown; there are lam, power and knots:S,S,..., as in knots:0,0.5,1.")
    ends: tuple[float, ...] = ()
    if limits is not None:
        parts = limits.split(":")
        if len(parts) != 2:
            raise ValueError(f"--range {limits!r} is not understood; write LOW:HIGH, as in 0:1.5.")
        ends = tuple(float(decimal(part, limits, "--range")) for part in parts)
    if box and (kind != "lam" or len(anchors) < 2):
        raise ValueError("--box is for λ of several anchors.")
    if kind == "lam" and len(anchors) > 1:
        return spaces.lams(anchors, *ends, simplex=not box)
    if len(anchors) > 1:
        raise ValueError(f"--over {kind} is searched for one anchor, got {len(anchors)}.")
    if kind == "lam":
        return spaces.lam(anchors[0], *ends)
    if kind == "power":
        return spaces.power(anchors[0], *ends)
    places = [float(decimal(part, over, "--over")) for part in rest.split(",")] if rest else [0.0, 0.5, 1.0]
    return spaces.knots(anchors[0], places, *ends)
