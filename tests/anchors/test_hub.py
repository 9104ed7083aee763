"""Anchors by hub id, end to end against a hub of our own on the loopback interface."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from anchor_files import lora, made, module_of, predict, saved
from deradiff.anchors import AnchorError, AnchorNotFound, IncompatibleAnchor, PickledAnchor, load_anchor
from hub_server import Hub, standing_in
from messages import naming

BARE = "diffusion_pytorch_model.safetensors"
REPO = "owner/aligned"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with standing_in(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a repository is put together."""
    return tmp_path / "repository"


def is_anchor(anchor, pipe, aligned) -> bool:
    return torch.equal(predict(pipe, module_of(anchor)), predict(pipe, aligned))


def test_a_denoiser_and_only_what_it_needs(hub, folder):
    pipe, aligned = made("sd")
    saved(aligned, folder)
    for extra in ("README.md", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors", "sample.png"):
        (folder / extra).write_bytes(b"not needed")
    hub.add(REPO, folder)
    anchor = load_anchor(REPO, pipe)
    assert is_anchor(anchor, pipe, aligned) and anchor.source == REPO
    assert sorted(hub.downloads()) == ["config.json", BARE]


def test_a_repository_with_only_a_unet_folder(hub, folder):
    pipe, aligned = made("sd")
    saved(aligned, folder / "unet", max_shard_size="50KB")
    hub.add(REPO, folder)
    assert is_anchor(load_anchor(REPO, pipe), pipe, aligned)
    assert len(hub.downloads()) > 3 and not any(name.endswith(".index.json") for name in hub.downloads())


def test_a_whole_pipeline_is_not_downloaded_whole(hub, folder):
    pipe, aligned = made("sd")
    other, _ = made("sd")
    other.unet = aligned
    other.save_pretrained(folder)
    hub.add(REPO, folder)
    assert is_anchor(load_anchor(REPO, pipe), pipe, aligned)
    expected = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", f"unet/{BARE}"]
    assert sorted(hub.downloads()) == expected


def test_revision_and_subfolder(hub, folder):
    pipe, first = made("sd")
    second = copy.deepcopy(first)
    second.conv_out.weight.data += 1
    saved(first, folder / "checkpoints" / "best")
    hub.add(REPO, folder, "v1.0")
    saved(second, folder / "checkpoints" / "best")
    hub.add(REPO, folder)
    for revision, model in (("v1.0", first), (None, second), (hub.commit(REPO, "v1.0"), first)):
        anchor = load_anchor(REPO, pipe, subfolder="checkpoints/best", revision=revision)
        assert is_anchor(anchor, pipe, model)
        assert revision is None or repr(revision) in anchor.source
    with pytest.raises(AnchorNotFound, match=naming(REPO, "'v2'")):
        load_anchor(REPO, pipe, revision="v2")
    with pytest.raises(AnchorNotFound, match=naming(REPO, "'worst'", "checkpoints/best/config.json")):
        load_anchor(REPO, pipe, subfolder="worst")


def test_what_is_cached_is_not_downloaded_again(hub, folder):
    pipe, aligned = made("sd")
    hub.add(REPO, saved(aligned, folder))
    load_anchor(REPO, pipe)
    hub.reset()
    assert is_anchor(load_anchor(REPO, pipe), pipe, aligned)
    assert hub.requests and not hub.downloads()


def test_a_new_commit_is_noticed(hub, folder):
    pipe, aligned = made("sd")
    hub.add(REPO, saved(aligned, folder))
    load_anchor(REPO, pipe)
    aligned.conv_out.weight.data += 1
    hub.add(REPO, saved(aligned, folder))
    hub.reset()
    assert is_anchor(load_anchor(REPO, pipe), pipe, aligned)
    assert hub.downloads() == [BARE]


@pytest.mark.parametrize("how", ["local_files_only", "offline", "unreachable", "broken"])
@pytest.mark.cases(2)
def test_the_cache_serves_without_a_hub(how, hub, folder, monkeypatch):
    pipe, aligned = made("sd")
    saved(aligned, folder / "unet", max_shard_size="50KB")
    hub.add(REPO, folder, "v1.0")
    load_anchor(REPO, pipe, revision="v1.0")
    hub.reset()
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.broken = how == "broken"
    anchor = load_anchor(REPO, pipe, revision="v1.0", local_files_only=how == "local_files_only")
    assert is_anchor(anchor, pipe, aligned)
    assert how == "broken" or not hub.requests


@pytest.mark.parametrize("how", ["local_files_only", "offline", "unreachable", "broken"])
def test_without_a_hub_and_without_a_cache(how, hub, monkeypatch):
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.broken = how == "broken"
    expected = {
        "local_files_only": naming(REPO, "local_files_only=True"),
        "offline": naming(REPO, "HF_HUB_OFFLINE"),
        "unreachable": naming(REPO, "ConnectError"),
        "broken": naming(REPO, 500),
    }[how]
    with pytest.raises(AnchorNotFound, match=expected):
        load_anchor(REPO, made("sd")[0], local_files_only=how == "local_files_only")


def test_a_partial_cache_is_no_anchor(hub, folder):
    pipe, aligned = made("sd")
    saved(aligned, folder, max_shard_size="50KB")
    hub.add(REPO, folder)
    load_anchor(REPO, pipe)
    next(Path(constants.HF_HUB_CACHE).rglob("*-00002-of-*")).unlink()
    with pytest.raises(AnchorNotFound, match=naming("shards", [2])):
        load_anchor(REPO, pipe, local_files_only=True)


def test_ids_that_do_not_exist_or_are_closed(hub, folder):
    pipe, aligned = made("sd")
    with pytest.raises(AnchorNotFound, match=naming("'owner/absent'", Path("owner/absent").absolute())):
        load_anchor("owner/absent", pipe)
    hub.add(REPO, saved(aligned, folder))
    hub.gated.add(REPO)
    with pytest.raises(AnchorNotFound, match=naming(REPO, f"{hub.url}/{REPO}")):
        load_anchor(REPO, pipe)


def test_pickles_are_refused_before_they_are_downloaded(hub, folder):
    pipe, aligned = made("sd")
    saved(aligned, folder, safe_serialization=False)
    hub.add(REPO, folder)
    with pytest.raises(PickledAnchor, match=r"diffusion_pytorch_model\.bin"):
        load_anchor(REPO, pipe)
    assert not hub.downloads()
    assert is_anchor(load_anchor(REPO, pipe, allow_pickle=True), pipe, aligned)


def test_another_architecture_is_refused_by_its_config(hub, folder):
    pipe, _ = made("sd")
    hub.add(REPO, saved(made("sd_inpaint_9_channels")[1], folder))
    with pytest.raises(IncompatibleAnchor, match=naming("in_channels", 9)):
        load_anchor(REPO, pipe)


def test_a_lora_and_a_choice_of_files(hub, folder):
    pipe, aligned = made("sd")
    before, wrapped = predict(pipe), lora(pipe.unet)
    wrapped.save_pretrained(folder / "peft")
    save_file(aligned.state_dict(), saved_in(folder) / "one.safetensors")
    save_file({name: t * 2 for name, t in aligned.state_dict().items()}, folder / "two.safetensors")
    hub.add(REPO, folder)
    anchor = load_anchor(REPO, pipe, subfolder="peft")
    assert sorted(hub.downloads()) == ["peft/adapter_config.json", "peft/adapter_model.safetensors"]
    pipe.unet.set_adapter(anchor.adapter)
    assert torch.equal(predict(pipe), predict(pipe, wrapped))
    anchor.unload(pipe.unet)
    assert torch.equal(predict(pipe), before)

    with pytest.raises(AnchorError, match=naming(REPO, "one.safetensors, two.safetensors", "'owner/name/file")):
        load_anchor(REPO, pipe)
    hub.reset()
    assert is_anchor(load_anchor(f"{REPO}/one.safetensors", pipe), pipe, aligned)
    assert hub.downloads() == ["one.safetensors"]
    assert load_anchor(f"{REPO}/peft/adapter_model.safetensors", pipe).adapter is not None
    with pytest.raises(AnchorNotFound, match=naming(REPO, "'three.safetensors'")):
        load_anchor(f"{REPO}/three.safetensors", pipe)


def saved_in(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- downloads that break off -----------------------------------------------------------------------------------------


def test_a_download_that_breaks_off_once_is_taken_up_again(hub, folder):
    pipe, aligned = made("sd")
    hub.add(REPO, saved(aligned, folder))
    hub.cuts[BARE] = [1000]
    assert is_anchor(load_anchor(REPO, pipe), pipe, aligned)
    assert hub.downloads().count(BARE) == 2


def test_a_download_that_keeps_breaking_off_is_an_error_and_never_an_anchor(hub, folder):
    pipe, aligned = made("sd")
    before = predict(pipe)
    hub.add(REPO, saved(aligned, folder))
    hub.cuts[BARE] = [1000] * 20
    with pytest.raises(AnchorNotFound, match=naming(REPO, "download")):
        load_anchor(REPO, pipe)
    with pytest.raises(AnchorNotFound):
        load_anchor(REPO, pipe, local_files_only=True)
    assert torch.equal(predict(pipe), before)
    hub.cuts.clear()
    assert is_anchor(load_anchor(REPO, pipe), pipe, aligned)


def test_the_environment_variable_leads_to_the_hub(hub, folder, tmp_path):
    """The same in a process of its own, which knows the hub by HF_ENDPOINT and nothing else."""
    pipe, aligned = made("sd")
    hub.add(REPO, saved(aligned, folder))
    saved(pipe.unet, tmp_path / "reference")
    program = (
        "import sys, types; from diffusers import UNet2DConditionModel; from deradiff import load_anchor\n"
        "pipe = types.SimpleNamespace(unet=UNet2DConditionModel.from_pretrained(sys.argv[1]))\n"
        "print(float(load_anchor(sys.argv[2], pipe).module.conv_in.weight.sum()))"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": paths}
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", program, str(tmp_path / "reference"), REPO]
    online = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(online.stdout) == aligned.conv_in.weight.sum().item()
    assert sorted(hub.downloads()) == ["config.json", BARE]
