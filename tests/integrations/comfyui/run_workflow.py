"""An example workflow through ComfyUI's own loader of custom nodes and its own executor, headless, from JSON to PNG.

    python tests/integrations/comfyui/run_workflow.py FOLDER WORKFLOW

Checkpoints are replaced by tiny random models of ComfyUI's classes, which a node of the tests loads by the checkpoint's
name; everything else is the host's own: its nodes, samplers, executor and PNG writer. Prints the image's path.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import comfyui_models
from comfyui_host import require_comfyui


class TinyClip:
    """Makes conditioning of a text, as `CLIPTextEncode` wants it."""

    def __init__(self, family: str) -> None:
        self._family = family

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> Any:
        return comfyui_models.conditioning(self._family, len(tokens))


class TinyVae:
    """Shows the first three channels."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :3].movedim(1, -1).sigmoid().repeat_interleave(8, 1).repeat_interleave(8, 2)


def tiny_checkpoint(self: Any, ckpt_name: str) -> tuple[Any, ...]:
    """What stands for `CheckpointLoaderSimple`: the same name, the same weights."""
    family = "sd3" if ckpt_name.startswith("sd3") else "sdxl"
    return comfyui_models.model(family, sum(ckpt_name.encode())), TinyClip(family), TinyVae()


class NoServer:
    """What the executor tells a browser."""

    client_id = None
    last_node_id = None

    def send_sync(self, event: str, data: Any, sid: Any = None) -> None:
        if event == "execution_error":
            print(data["exception_message"], file=sys.stderr)


def prompt_of(workflow: dict[str, Any], classes: dict[str, Any]) -> dict[str, Any]:
    """The workflow of a page as its own script sends it to the executor."""
    links = {number: (str(source), slot) for number, source, slot, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        kinds = classes[node["type"]].INPUT_TYPES()
        inputs = {i["name"]: list(links[i["link"]]) for i in node["inputs"] if i["link"]}
        values = iter(node["widgets_values"])
        sockets = {i["name"] for i in node["inputs"]}
        for name, (_, *options) in {**kinds.get("required", {}), **kinds.get("optional", {})}.items():
            if name not in sockets:
                inputs[name] = next(values)
                if options and options[0].get("control_after_generate"):
                    next(values)
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


async def run(folder: Path, file: Path) -> Path:
    import execution
    import folder_paths
    import nodes
    from safetensors.torch import save_file

    from deradiff.integrations.comfyui.installing import SOURCE

    folder_paths.set_output_directory(str(folder))
    loras = folder / "loras"
    loras.mkdir()
    folder_paths.folder_names_and_paths["loras"] = ([str(loras)], {".safetensors"})
    save_file(
        {
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_up.weight": torch.ones(64, 2),
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight": torch.ones(2, 64),
        },
        loras / "dpo-sdxl-lora.safetensors",
    )
    await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
    assert await nodes.load_custom_node(str(SOURCE), module_parent="custom_nodes")
    loader = nodes.NODE_CLASS_MAPPINGS["CheckpointLoaderSimple"]
    loader.load_checkpoint = tiny_checkpoint
    loader.INPUT_TYPES = classmethod(lambda cls: {"required": {"ckpt_name": ("STRING", {})}})
    workflow = json.loads(file.read_text())
    for node in workflow["nodes"]:  # small images, and few steps
        if node["type"] == "EmptyLatentImage":
            node["widgets_values"] = [64, 64, 1]
    prompt = prompt_of(workflow, nodes.NODE_CLASS_MAPPINGS)
    valid, error, outputs, node_errors = await execution.validate_prompt("test", prompt, None)
    assert valid, (error, node_errors)
    executor = execution.PromptExecutor(NoServer())
    await executor.execute_async(prompt, "test", {"extra_pnginfo": {"workflow": workflow}}, outputs)
    assert executor.success, executor.status_messages
    return folder


if __name__ == "__main__":
    require_comfyui()
    with torch.inference_mode():
        out = asyncio.run(run(Path(sys.argv[1]), Path(sys.argv[2])))
    print(*sorted(out.glob("*.png")))
