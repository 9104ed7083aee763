"""What can be wrong with an anchor."""


class AnchorError(ValueError):
    """An anchor that cannot be used with this pipeline; the message says why and what to do."""


class PipelineWithoutDenoiser(AnchorError):
    """The pipeline has neither a `unet` nor a `transformer`."""


class AnchorNotFound(AnchorError):
    """No such file, folder, hub id, revision or subfolder, or one that cannot be reached."""


class CorruptAnchor(AnchorError):
    """A file that is there but truncated, damaged, or not what its name says."""


class PickledAnchor(AnchorError):
    """Weights stored as pickle, which can run code when opened."""


class IncompatibleAnchor(AnchorError):
    """A sound model that is no counterpart of the reference: other architecture, prediction type or channels."""
