"""deradiff's nodes for ComfyUI, which come with the Python package of that name: `pip install deradiff`."""

try:
    from deradiff.integrations.comfyui.registering import class_mappings, comfy_entrypoint
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("deradiff"):
        raise
    raise ModuleNotFoundError("deradiff is not installed in ComfyUI's Python: python -m pip install deradiff") from None

try:
    from comfy_api.latest import ComfyExtension  # noqa: F401

    __all__ = ["comfy_entrypoint"]
except ImportError:  # before the current API
    NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = class_mappings()
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
