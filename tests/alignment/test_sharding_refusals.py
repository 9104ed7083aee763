"""What is not divided among processes here is refused, with the way out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from deradiff.alignment.loop import train
from deradiff.alignment.training import BatchPart, TrainingRun
from test_align_sharded import SHORT, pretend


@pytest.mark.parametrize(
    ("kind", "plugin", "optimizer", "words"),
    [
        ("FSDP", {"fsdp_version": 1}, "adamw", "FSDP of version 1.*`fsdp_version: 2`"),
        ("DEEPSPEED", {"fsdp_version": 1}, "adamw", "DeepSpeed.*FSDP"),
        (
            "FSDP",
            {"fsdp_version": 2, "activation_checkpointing": True},
            "adamw",
            "`fsdp_activation_checkpointing`",
        ),
        ("FSDP", {"fsdp_version": 2}, "adamw8bit", "adamw8bit.*--optimizer adamw"),
    ],
)
def test_what_is_not_divided_here_is_refused(
    kind: str, plugin: dict[str, Any], optimizer: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = Accelerator(cpu=True)
    for state, held in pretend(DistributedType[kind], **plugin):
        for name, value in held.items():
            monkeypatch.setitem(state, name, value)

    def loss(model: nn.Module, _: torch.Generator, part: BatchPart) -> torch.Tensor:
        return model(torch.ones(1, 2)).sum()

    with pytest.raises(ValueError, match=words):
        train(
            nn.Linear(2, 1),
            loss,
            lambda _: 0.0,
            replace(SHORT, optimizer=optimizer),
            run=TrainingRun(
                seed=0,
                checkpoint=tmp_path / "state",
                report=lambda *_: None,
                accelerator=accelerator,
            ),
        )
