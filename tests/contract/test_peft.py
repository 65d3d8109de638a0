"""peft wraps a fused model: LoRA in pretrained layers, beside what fusion added."""

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from support import TinyEncoder, inputs, open_gates, same_state, state, text, tiny_decoder

from torchfuse import describe, fuse, generate, get_fusion_params, load_fusion, save_fusion

peft = pytest.importorskip("peft")
if Version(version("torchao")) < Version("0.16"):
    pytest.skip("peft needs torchao 0.16 or newer", allow_module_level=True)

TARGETS = r"decoder\.layers\.\d+\.attn\.(q_proj|v_proj)"  # not those of the fusion layers


def make():
    return open_gates(fuse(tiny_decoder(), TinyEncoder(), every=2)).eval()


def wrap(model):
    """LoRA, and what fusion added, are trainable."""
    fusion = list(get_fusion_params(model).values())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    for parameter in fusion:
        parameter.requires_grad_(True)
    return wrapped


def train(model):
    """One step that changes everything that is trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(2):  # B of LoRA starts at zero, and then A has no gradient
        model(text(), encoder_input=inputs()).square().mean().backward()
        optimizer.step()


def test_lora_and_fusion_train_beside_a_frozen_base():
    base = make()
    names, before = list(base.state_dict()), state(base)
    fusion = set(get_fusion_params(base))
    with torch.no_grad():
        expected = base(text(), encoder_input=inputs())
    model = wrap(base)
    with torch.no_grad():
        assert torch.equal(model(text(), encoder_input=inputs()), expected)
    table = describe(model)
    assert table["decoder"].trainable == 3 * (18 * 3 + 3 * 18 + 18 * 3 + 3 * 6)
    assert table["fusion"].trainable == table["fusion"].parameters

    train(model)
    merged = model.merge_and_unload()
    assert merged is base and list(merged.state_dict()) == names
    changed = {
        name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])
    }
    lora = {f"decoder.layers.{i}.attn.{name}.weight" for i in range(3) for name in ("q_proj", "v_proj")}
    assert changed == fusion | lora


def test_what_was_trained_is_saved_and_loaded(tmp_path):
    trained = wrap(make())
    train(trained)
    trained.save_pretrained(tmp_path / "lora")
    save_fusion(trained, tmp_path / "fusion")

    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "lora")
    load_fusion(loaded, tmp_path / "fusion")
    assert same_state(state(loaded), trained)
    options = {"encoder_input": inputs(), "max_new_tokens": 5, "temperature": 0}
    assert torch.equal(generate(loaded, text(), **options), generate(trained, text(), **options))
