"""The nodes as ComfyUI wants to have them: its current API, and the mappings of versions before it.

Both are made of the same descriptions.
"""

from __future__ import annotations

from typing import Any

from deradiff.integrations.comfyui.checks import require_host
from deradiff.integrations.comfyui.nodes import CATEGORY, NODES, NodeDescription, NodeInput


def comfy_entrypoint() -> Any:
    """ComfyUI's entry point for `io.ComfyNode`s. Raises `HostError` where it lacks what the nodes need."""
    require_host()
    from comfy_api.latest import ComfyExtension, io

    class RealignExtension(ComfyExtension):
        """What ComfyUI asks for the nodes."""

        async def get_node_list(self) -> list[Any]:
            """The nodes, as classes of the host's."""
            return [_comfy_node(io, node) for node in NODES]

    return RealignExtension()


def class_mappings() -> tuple[dict[str, Any], dict[str, str]]:
    """`NODE_CLASS_MAPPINGS` and `NODE_DISPLAY_NAME_MAPPINGS`. Raises `HostError` as `comfy_entrypoint`."""
    require_host()
    return {node.id: _mapped_class(node) for node in NODES}, {node.id: node.title for node in NODES}


def _comfy_node(io: Any, node: NodeDescription) -> Any:
    def define_schema(cls: Any) -> Any:
        outputs = [
            io.Custom(output.type).Output(id=output.name, display_name=output.name, tooltip=output.tooltip)
            for output in node.outputs
        ]
        return io.Schema(
            node_id=node.id,
            display_name=node.title,
            category=CATEGORY,
            description=node.description,
            inputs=[_input(io, field) for field in node.inputs],
            outputs=outputs,
        )

    def execute(cls: Any, **inputs: Any) -> Any:
        return io.NodeOutput(*node.run(**inputs))

    members = {
        "define_schema": classmethod(define_schema),
        "execute": classmethod(execute),
        "__doc__": node.description,
    }
    return type(node.id, (io.ComfyNode,), members)


def _input(io: Any, field: NodeInput) -> Any:
    common: dict[str, Any] = {"tooltip": field.tooltip, "optional": not field.required}
    options = dict(field.options)
    if field.socket:
        return io.Custom(field.type).Input(field.name, **common, extra_dict={"forceInput": True})
    match field.type:
        case "COMBO":
            options["options"] = _choices(field)
            return io.Combo.Input(field.name, **common, **options)
        case "FLOAT":
            return io.Float.Input(field.name, **common, **options)
        case "STRING":
            return io.String.Input(field.name, **common, **options)
    return io.Custom(field.type).Input(field.name, **common)


def _mapped_class(node: NodeDescription) -> Any:
    def input_types(cls: Any) -> dict[str, Any]:
        kinds: dict[str, dict[str, Any]] = {"required": {}, "optional": {}}
        for field in node.inputs:
            options = {key: value for key, value in field.options.items() if key != "options"} | {
                "tooltip": field.tooltip
            }
            if field.socket:
                options["forceInput"] = True
            kind = _choices(field) if field.type == "COMBO" else field.type
            kinds["required" if field.required else "optional"][field.name] = (kind, options)
        return kinds

    def run(self: Any, **inputs: Any) -> tuple[Any, ...]:
        return node.run(**inputs)

    return type(
        node.id,
        (),
        {
            "INPUT_TYPES": classmethod(input_types),
            "RETURN_TYPES": tuple(output.type for output in node.outputs),
            "RETURN_NAMES": tuple(output.name for output in node.outputs),
            "OUTPUT_TOOLTIPS": tuple(output.tooltip for output in node.outputs),
            "FUNCTION": "run",
            "CATEGORY": CATEGORY,
            "DESCRIPTION": node.description,
            "run": run,
        },
    )


def _choices(field: NodeInput) -> list[str]:
    """What a COMBO offers: its options, or the safetensors files of a folder of the host's."""
    if not field.files:
        return list(field.options["options"])
    import folder_paths

    return [name for name in folder_paths.get_filename_list(field.files) if name.endswith(".safetensors")]
