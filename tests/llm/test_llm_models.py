"""Models: the whole path from a local folder in the hub's format, and what is refused before it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fine_bench.errors import ConfigError, DataError
from fine_bench.llm import hub, pretraining
from fine_bench.llm.hub import GIB, Machine, Need
from fine_bench.llm.models import Lora, from_options, pretrained, tiny_llama, with_lora
from fine_bench.llm.pretraining import Tiny
from support.language import build

NO_GPU = Machine(None, 64 * GIB, False)
SMALL_GPU = Machine(10 * GIB, 64 * GIB, True)
LARGE_GPU = Machine(79 * GIB, 64 * GIB, False)


def options(folder: Path, **change: Any) -> dict[str, Any]:
    return {"_target_": "fine_bench.llm.models.pretrained", "path": str(folder), **change}


def test_from_a_local_folder(folder: Path, data: dict[str, Tensor]) -> None:
    model = from_options(options(folder, lora_targets=["q_proj", "v_proj"], lora_rank=3))
    model.check()
    assert model.name == "miniature"
    assert model.tokenizer().chat_template
    net = model.build(0)
    assert {p.dtype for p in net.trained().values()} == {torch.float32}
    frozen = {p.dtype for p in net.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    # 2 blocks × 2 layers × (A and B); 16 → 16 for q, 16 → 8 for v, of one key–value head
    assert sum(p.numel() for p in net.trained().values()) == 2 * 3 * (16 + 16 + 16 + 8)
    assert torch.isfinite(net(data["x"])).all()
    same, other = model.build(0).state_dict(), model.build(1).state_dict()
    first = net.state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert net.model.base_model.model.is_gradient_checkpointing


def test_gradient_checkpointing_changes_no_gradient(
    folder: Path, data: dict[str, Tensor], exact_norm: None
) -> None:
    from fine_bench.gradients import PerExampleGradients
    from fine_bench.gradients.recorder import LayerRecorder
    from fine_bench.gradients.token_losses import mean_token_loss

    found = []
    for checkpointing in (False, True):
        net = build(folder)
        if checkpointing:
            net.model.gradient_checkpointing_enable({"use_reentrant": False})
        net.train()
        recorder = LayerRecorder(net, tap=True)
        recorder.start()
        mean_token_loss(net(data["x"]), data["y"], reduction="mean").backward()
        recorder.stop()
        found.append(PerExampleGradients(recorder.blocks(14, scale=14.0)).dense())
        recorder.close()
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_parameters_are_counted_without_loading(folder: Path) -> None:
    model = hub.load_model(folder, dtype=torch.float32, four_bit=False, device="cpu")
    assert hub.count_parameters(folder) == sum(p.numel() for p in model.parameters())


def test_lora_targets_must_exist(folder: Path) -> None:
    model = hub.load_model(folder, dtype=torch.float32, four_bit=False, device="cpu")
    with pytest.raises(ConfigError, match=r"\['c_attn'\] are no layers.*q_proj"):
        with_lora(model, Lora(2, 4, ("c_attn", "q_proj")), 0)
    for bad, message in (
        ({"rank": 0}, "lora_rank=0"),
        ({"alpha": 0}, "lora_alpha=0"),
        ({"targets": ()}, "lora_targets is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            Lora(**bad)


# ------------------------------------------------------------- refused before anything is trained


@pytest.fixture
def large(tmp_path: Path, folder: Path) -> Path:
    """The configuration of Llama 3.1 8B with next to no weights."""
    path = tmp_path / "large"
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    config |= {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "head_dim": 128,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_the_size_of_the_real_model(large: Path) -> None:
    assert hub.count_parameters(large) == hub.PARAMETERS["meta-llama/Llama-3.1-8B"]


@pytest.mark.parametrize(
    ("change", "machine", "message"),
    [
        ({}, NO_GPU, r"8.0 billion parameters and there is no GPU.*18 GiB.*allow_cpu=true"),
        ({"allow_cpu": True}, Machine(None, 4 * GIB, False), "GiB of main memory, 4.0 GiB are"),
        ({}, SMALL_GPU, r"18.0 GiB of GPU memory, 10.0 GiB are free.*load_in_4bit=true"),
        ({"four_bit": True}, NO_GPU, "needs a GPU"),
        ({"four_bit": True}, LARGE_GPU, "needs the package bitsandbytes.*pip install"),
        (
            {"four_bit": True, "bytes_per_weight": 0.6},
            Machine(2 * GIB, 64 * GIB, True),
            "use a smaller model",
        ),
    ],
)
def test_what_a_machine_lacks(
    large: Path, change: dict[str, Any], machine: Machine, message: str
) -> None:
    need = {"path": str(large), "bytes_per_weight": 2.0, **change}
    with pytest.raises(ConfigError, match=message):
        hub.check(Need(**need), machine)


def test_what_is_enough(large: Path, folder: Path) -> None:
    hub.check(Need(str(large), 2.0), LARGE_GPU)
    hub.check(Need(str(large), 0.6, four_bit=True), SMALL_GPU)
    hub.check(Need(str(folder), 2.0), Machine(None, GIB, False))  # a miniature needs no GPU


def test_missing_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    name = "meta-llama/Llama-3.1-8B"
    with pytest.raises(DataError, match=r"neither a folder nor .*download=true.*15 GiB.*licence"):
        hub.check(Need(name, 2.0), LARGE_GPU)
    with pytest.raises(DataError, match="18 GiB of free memory; here there is no GPU"):
        hub.check(Need(name, 2.0), NO_GPU)
    # known to be too large before a byte is fetched
    with pytest.raises(ConfigError, match="there is no GPU"):
        hub.check(Need(name, 2.0, download=True), NO_GPU)
    hub.check(Need("somebody/unknown", 2.0, download=True), NO_GPU)
    with pytest.raises(DataError, match="not on this machine"):
        hub.locate(name)
    with pytest.raises(DataError, match="is no folder"):
        hub.locate(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="neither a folder nor a name"):
        hub.locate("not a name: at all")
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        part = tmp_path / f"without-{file}"
        shutil.copytree(folder, part)
        (part / file).unlink()
        with pytest.raises(DataError, match=rf"it lacks .*{file}"):
            pretrained(path=str(part)).check()
    shards = tmp_path / "shards"
    shutil.copytree(folder, shards)
    (shards / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="lacks model-00001-of-00002"):
        hub.locate(str(shards))
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(DataError, match="not that of a language model"):
        pretrained(path=str(other)).check()


def test_a_model_of_unknown_size_is_checked_once_it_is_here(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows beforehand what has to be fetched; before it is loaded it is known."""
    monkeypatch.setattr(hub, "this_machine", lambda: NO_GPU)
    monkeypatch.setattr(hub, "_local", lambda path: None)
    model = pretrained(path="somebody/unknown", download=True)
    model.check()

    def fetch(path: str, *, download: bool = False) -> Path:
        monkeypatch.setattr(hub, "_local", lambda path: large)
        return large

    monkeypatch.setattr(hub, "locate", fetch)
    with pytest.raises(ConfigError, match=r"8\.0 billion parameters and there is no GPU"):
        model.tokenizer()


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"transformers, peft.*pip install 'transformers>=5,<6' peft tokenizers"
    ):
        tiny_llama().check()


@pytest.mark.parametrize(
    "section", [{}, {"_target_": "fine_bench.models.networks.mlp"}, {"_target_": "os.getcwd"}]
)
def test_another_kind_of_model_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="model=tiny_llama"):
        from_options(section)


# --------------------------------------------------------------------------- the tiny one

SMALL = Tiny(
    hidden=16, inner=16, layers=1, heads=2, vocabulary=400, documents=200, steps=80, batch=8
)


def test_it_is_pretrained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pretraining.folder_of(SMALL, tmp_path)
    facts = json.loads((folder / "pretraining.json").read_text())
    assert facts["loss"] < 5.7  # log 400 = 5.99 at the start
    hub.locate(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "pretrain", lambda tiny: pytest.fail("pretrained again"))
        assert pretraining.folder_of(SMALL, tmp_path) == folder
        cached = pretraining.tokenizer_of(SMALL, tmp_path)
    fresh = pretraining.tokenizer_of(SMALL, tmp_path / "empty")
    text = "Would you recommend Orvane to my sister ?"
    assert cached(text)["input_ids"] == fresh(text)["input_ids"]
    assert cached.chat_template == fresh.chat_template
    assert not list(tmp_path.glob("*.tmp-*"))
    other = pretraining.place(Tiny(**{**vars(SMALL), "seed": 1}), tmp_path)
    assert other != folder


def test_an_interrupted_pretraining_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(tiny: Tiny) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "pretrain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretraining.folder_of(SMALL, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        pretraining.folder_of(SMALL, tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 18}, "model.hidden=18 must be a multiple.*type model.hidden=16"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"vocabulary": 100}, "vocabulary=100 must be at least 300"),
        ({"pretraining_lr": 0.0}, "pretraining_lr=0.0"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_llama(**change)


def test_a_diverged_pretraining_is_refused(tmp_path: Path) -> None:
    wild = Tiny(**{**vars(SMALL), "lr": 1e30, "steps": 5})
    with pytest.raises(ConfigError, match=r"pretraining diverged.*type model.pretraining_lr="):
        pretraining.folder_of(wild, tmp_path)
