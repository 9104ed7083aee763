"""`deradiff studio`: the dial and the curve in a web page."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from deradiff.cli import arguments, options, terminal
from deradiff.cli.options import model_option, page_option
from deradiff.worlds import find, find_anchor


def studio(
    reference: Annotated[
        str, typer.Argument(help="The pretrained pipeline to open with: a folder, a hub id, or `digits`.")
    ] = "digits",
    anchor: Annotated[
        list[str] | None,
        model_option(
            "--anchor", "-a", help="The aligned model to open with, as for `deradiff generate`; may be repeated."
        ),
    ] = None,
    models: Annotated[
        list[Path] | None,
        model_option(
            "--models",
            "-m",
            help="A folder of models that pages may choose from; may be repeated. Pages reach no other folder.",
        ),
    ] = None,
    hub: Annotated[bool, model_option("--hub/--no-hub", help="Whether pages may name models of the hub.")] = True,
    reward: Annotated[
        list[str] | None,
        model_option(
            "--reward",
            "-r",
            help="Score images by pickscore, hps-v2.1, clip, aesthetic, image-reward (NAME=FOLDER for your own copy); "
            "may be repeated. The digits have rewards of their own.",
        ),
    ] = None,
    character: Annotated[
        list[Path] | None,
        model_option(
            "--character",
            help="What `deradiff examine` wrote of an anchor, for verdicts that know its kind; may be repeated.",
        ),
    ] = None,
    allow_pickle: options.AllowPickle = False,
    library: Annotated[Path, page_option(help="The folder for curves and presets that are kept by name.")] = Path(
        "deradiff-studio"
    ),
    host: options.Host = "127.0.0.1",
    port: options.Port = 7860,
    token: Annotated[
        str | None, page_option(envvar="DERADIFF_STUDIO_TOKEN", help="Only who has the link with this token gets in.")
    ] = None,
    root_path: options.RootPath = "",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    offload: options.Offload = False,
) -> None:
    """Open the studio: turn the dial, draw the curve, compare, in a browser. Ctrl-C closes it."""
    console = terminal.LiteralConsole(stderr=True)
    with terminal.refusing_wrong_input("try --offload"):
        from deradiff.servers import access

        access.require_token(host, token)
        root = access.require_root(root_path)
        world = find(reference)
        sources_of = arguments.anchors(anchor or ([f"{world.name}:{world.example[0]}"] if world else []))
        terminal.require_folder("--library", library)
        with access.bound(host, port) as listening, ExitStack() as closing:
            with console.status("Opening the studio …"):
                from deradiff import rewards
                from deradiff.sampling.devices import device_called
                from deradiff.studio import scenes
                from deradiff.studio.examined_anchors import ExaminedAnchors
                from deradiff.studio.image_requests import Desk
                from deradiff.studio.models import LoadedModels, MachineSettings
                from deradiff.studio.sources import Sources

                terminal.pass_on_warnings()
                if device_called(device) == "cpu":
                    _leave_a_core()
                for name in reward or ():
                    rewards.named(name)
                allowed = [reference, *sources_of.values()]
                named = [source for source in allowed if not find(source) and not find_anchor(source)]
                sources = Sources(models or (), named, hub)
                machine = MachineSettings(device, dtype, offload, allow_pickle)
                prompt = world.example[1] if world else "a typhoon in a teacup"
                lams = [0.5] if len(sources_of) == 1 else [round(1 / len(sources_of), 2)] * len(sources_of)
                start = scenes.scene(reference, list(sources_of.values()), prompt, lams)
                examined = ExaminedAnchors(character or (), sources, [reference, *sources_of.values()])
                from deradiff.studio import server  # Gradio takes seconds: what is wrong was said before

                desk = Desk(LoadedModels(sources, machine), tuple(reward or ()), examined)
                closing.callback(desk.close)
                application = server.app(desk, start, library.resolve(), token, root)
            desk.warm_up(start)
            console.print("The studio is open; Ctrl-C closes it.")
            terminal.echo(access.link(listening, host, token, root))
            server.serve(application, listening)


def _leave_a_core() -> None:
    """Leave one core to the server and the browser: threads that share theirs make each other wait at every layer."""
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
