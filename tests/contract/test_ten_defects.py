"""The ten families of defects of the implementation that issue 5 starts from, a test each.

A test that shows one has its number in its name, ``test_defect_<n>_...``, wherever it stands:

1. Labels that are not shifted: ``tests/test_training.py``, and of every architecture
   ``tests/models/test_architectures.py``.
2. Tests of learning that copying passes: here.
3. Freeze stages: ``tests/params/``.
4. Micro-batches without a label, ranks without a modality: ``tests/test_training.py``,
   ``tests/contract/test_participate.py``, ``tests/models/test_architectures.py``.
5. Means of means: ``tests/test_training.py`` over micro-batches, ``tests/recipes/test_digits.py`` over
   ranks.
6. Pads, batch mates and later tokens that compete: ``tests/modules/test_modality_experts.py``,
   ``tests/models/test_architectures.py``.
7. Cadences, configurations and orders that are ignored in silence: here, and
   ``tests/recipes/test_architectures_by_name.py`` for the command line.
8. Ends, truncation, means and sizes: ``tests/data/``, and here as a recipe asks.
9. New layers that no wrapper takes, counts without the encoder: here, ``tests/models/test_lengths.py``
   and ``tests/generation/test_batches.py``.
10. What is written, and generation: here, ``tests/checkpoint/test_fusion_artifact.py`` and
    ``tests/generation/test_generate.py``.
"""

import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from support import FEATURES, IMAGE, LAYERS, VOCAB, TinyEncoder, inputs, state, text, tiny_decoder
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torchtune.training import set_activation_checkpointing

from torchfuse import (
    from_pretrained,
    fuse,
    generate,
    get_fusion_params,
    load_fusion,
    save_fusion,
    save_pretrained,
)
from torchfuse.checkpoint.artifact.trained import save_trained
from torchfuse.data.images import ImageTransform
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.models import VLMConfig, build_modality_strategy
from torchfuse.models.decoders.llama import llama_decoder
from torchfuse.naming import unwrap
from torchfuse.tasks.runs import check_images
from torchfuse.training.loss import next_token_loss

ARCHS = {
    "cross_attention": {"every": 1},
    "joint_decoder": {"placement": "prefix"},
    "mot": {},
    "moma": {"num_experts": 2},
    "deepstack": {},
}
PLACEHOLDER = {"placement": "placeholder", "encoder_token": IMAGE}
every_arch = pytest.mark.parametrize("arch", ARCHS)


def make(arch, encoder=None, **options):
    return fuse(tiny_decoder(), encoder or TinyEncoder(), arch=arch, **{**ARCHS[arch], **options})


@torch.no_grad()
def opened(model):
    """New weights that let features through; at their first values some let nothing."""
    generator = torch.Generator().manual_seed(23)
    for parameter in get_fusion_params(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


# --- 2 -------------------------------------------------------------------------------------------

CLASSES = 4


def questions(generator):
    """Random text and one of four images; the last id says which, and nothing but the image does."""
    shown = torch.randint(0, CLASSES, (16,), generator=generator)
    tokens = torch.randint(CLASSES, VOCAB, (16, 7), generator=generator)
    tokens[:, -1] = shown
    return tokens, tokens.masked_fill(torch.arange(7) < 6, -100), inputs(CLASSES)["x"], shown


@every_arch
def test_defect_2_what_is_learned_cannot_be_copied_and_gates_are_open(arch):
    torch.manual_seed(19)
    model = make(arch, encoder_trainable=True, decoder_trainable=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(29)
    losses = []
    for _ in range(80):
        tokens, labels, pictures, shown = questions(generator)
        total, count = next_token_loss(model(tokens, encoder_input={"x": pictures[shown]}), labels)
        losses.append(float(total.detach() / count))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    chance = math.log(CLASSES)  # what text alone allows
    assert losses[0] > chance
    assert sum(losses[-10:]) / 10 < chance / 2
    tokens, labels, pictures, shown = questions(generator)
    with torch.no_grad():
        for given in ({}, {"encoder_input": {"x": pictures[(shown + 1) % CLASSES]}}):
            total, count = next_token_loss(model(tokens, **given), labels)
            assert float(total / count) > chance - 0.1
    gates = [p for name, p in get_fusion_params(model).items() if name.endswith("_scale.scale")]
    assert len(gates) == (2 * LAYERS if arch == "cross_attention" else 0)
    assert all(gate != 0 for gate in gates)


# --- 7 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [LAYERS + 1, 0])
@pytest.mark.parametrize("arch", ["cross_attention", "mot", "moma", "deepstack"])
def test_defect_7_a_cadence_that_fuses_nothing_is_refused(arch, every):
    decoder = tiny_decoder()
    before = list(state(decoder))
    with pytest.raises(ValueError, match=f"every={every} fuses no layer of this decoder, which has 3"):
        fuse(decoder, TinyEncoder(), arch=arch, **{**ARCHS[arch], "every": every})
    assert list(decoder.state_dict()) == before
    assert get_fusion_params(make(arch, every=LAYERS - 1))


@every_arch
def test_defect_7_a_cadence_that_nothing_would_follow_is_refused(arch):
    decoder = tiny_decoder()
    before = list(state(decoder))
    options = {"layers": [0]}
    complaint = r"layers=\[0\] and every=100 both choose the layers to fuse: give one of them"
    if arch == "joint_decoder":
        options, complaint = (
            {"placement": "prefix"},
            "every=100 cannot be given: JointDecoderStrategy fus",
        )
    with pytest.raises(ValueError, match=complaint):
        fuse(decoder, TinyEncoder(), arch=arch, every=100, **options)
    assert list(decoder.state_dict()) == before
    assert fuse(decoder, TinyEncoder(), arch=arch, every=None, **options)


def test_defect_7_no_config_says_twice_which_layers_are_fused():
    sections = [
        yaml.safe_load(file.read_text()).get("model", {})
        for file in (Path(__file__).parents[2] / "recipes" / "configs").rglob("*.yaml")
    ]
    cadences = [section for section in sections if section.get("every") is not None]
    assert cadences
    assert not [section for section in cadences if "layers" in section]
    assert {section.get("arch", "cross_attention") for section in cadences} == {"cross_attention"}


@pytest.mark.parametrize(
    ("arch", "options", "complaint"),
    [
        ("mot", {"qk_norm": True}, "'mot': unknown option 'qk_norm'; it takes .*start"),
        ("moma", {"hidden_dim": 5}, "'moma': unknown option 'hidden_dim'; it takes .*capacity"),
        (
            "joint_decoder",
            {"start": "zero"},
            "'joint_decoder': unknown option 'start'; it takes placeme",
        ),
        ("cross_attention", {"placement": "prefix"}, "'cross_attention': unknown option 'placement'"),
        (
            "deepstack",
            {"capacity": 0.5},
            "'deepstack': unknown option 'capacity'; it takes .*hidden_dim",
        ),
    ],
)
def test_defect_7_an_architecture_takes_no_others_configuration(arch, options, complaint):
    for build in (lambda: make(arch, **options), lambda: VLMConfig(arch, options)):
        with pytest.raises(ValueError, match=complaint):
            build()
    own = VLMConfig(arch, {n: v for n, v in ARCHS[arch].items() if n != "every"}).strategy
    assert type(own) is type(make(arch).strategy)
    assert own.arch == arch
    assert (
        build_modality_strategy(arch, **(PLACEHOLDER if arch == "mot" else own.options())).arch == arch
    )


def named(arch, order=("eye", "ear"), **options):
    encoders = {"eye": TinyEncoder(), "ear": TinyEncoder(seed=6)}
    torch.manual_seed(3)
    model = make(arch, {name: encoders[name] for name in order}, **options).eval()
    generator, tensors = torch.Generator().manual_seed(5), get_fusion_params(model)
    with torch.no_grad():
        for name in sorted(tensors):
            tensors[name].add_(torch.randn(tensors[name].shape, generator=generator) * 0.3)
    return model


@every_arch
def test_defect_7_the_order_of_modalities_is_the_encoders_and_nothing_else_s(arch):
    model = named(arch)
    given = {"eye": inputs(), "ear": inputs(num=3, seed=9)}
    seen = {"eye": torch.ones(2, FEATURES).bool(), "ear": torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()}
    out = model(text(), encoder_input=given, encoder_mask=seen)
    turned = [{name: by_name[name] for name in ("ear", "eye")} for by_name in (given, seen)]
    assert torch.equal(model(text(), encoder_input=turned[0], encoder_mask=turned[1]), out)
    embeds = model.encode(turned[0])
    assert list(embeds) == model.encoder_names == ["eye", "ear"]
    again = model(text(), encoder_embeds=dict(reversed(embeds.items())), encoder_mask=turned[1])
    assert torch.equal(again, out)
    other = named(arch, ("ear", "eye"))
    assert sorted(other.state_dict()) == sorted(model.state_dict())
    other.load_state_dict(model.state_dict())
    reordered = other(text(), encoder_input=given, encoder_mask=seen)
    # Where features stand in a sequence, whoever stands behind sees more.
    assert torch.allclose(reordered, out, rtol=1e-4, atol=1e-5) == (arch == "cross_attention")


def small_parts():
    torch.manual_seed(3)
    decoder = llama_decoder(
        vocab_size=VOCAB,
        num_layers=2,
        num_heads=3,
        num_kv_heads=1,
        embed_dim=18,
        max_seq_len=53,
        intermediate_dim=29,
    )
    numbers = {"image_size": 12, "patch_size": 4, "embed_dim": 10, "num_layers": 2, "num_heads": 5}
    return decoder, {name: ClipVisionEncoder(**numbers) for name in ("left", "back")}


@every_arch
def test_defect_7_a_directory_keeps_the_order_of_modalities(arch, tmp_path):
    decoder, encoders = small_parts()
    model = opened(fuse(decoder, encoders, arch=arch, **ARCHS[arch])).eval()
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path).eval()
    assert again.encoder_names == ["left", "back"]
    given = {name: {"images": torch.randn(2, 3, 12, 12)} for name in encoders}
    assert torch.equal(again(text(), encoder_input=given), model(text(), encoder_input=given))


# --- 8 -------------------------------------------------------------------------------------------

SIGLIP = {"mean": [0.5] * 3, "std": [0.5] * 3}
OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def test_defect_8_images_are_made_as_the_encoder_was_trained_on_them(tmp_path):
    decoder, encoders = small_parts()
    model = fuse(decoder, encoders["left"], arch="mot")
    text_of = ", ".join(f'"{key}": {value}' for key, value in OPENAI.items())
    (tmp_path / "preprocessor_config.json").write_text(
        f'{{"size": 12, "crop_size": 12, "do_center_crop": true, {text_of}}}'
    )
    check_images(model, ImageTransform.from_directory(tmp_path), tmp_path)
    with pytest.raises(
        ValueError, match=r"mean is \[0\.5, 0\.5, 0\.5\], the encoder's \[0\.48.*; std is \[0\.5, "
    ):
        check_images(model, ImageTransform(12, **SIGLIP), tmp_path)
    with pytest.raises(ValueError, match="size is 16, the encoder's 12"):
        check_images(model, ImageTransform(16), None)
    with pytest.raises(ValueError, match=r"must|takes|expects|got .*16"):
        model(text(), encoder_input={"images": torch.zeros(2, 3, 16, 16)})


# --- 9 -------------------------------------------------------------------------------------------


@every_arch
def test_defect_9_activation_checkpointing_wraps_every_new_layer(arch):
    model = opened(make(arch, encoder_trainable=True)).eval()
    new = {id(m) for n, m in model.layers.named_modules() if n.endswith("fusion_layer")}
    assert len(new) == {"joint_decoder": 0, "moma": LAYERS - 1, "deepstack": LAYERS - 1}.get(
        arch, LAYERS
    )
    # As the recipe asks for it.
    set_activation_checkpointing(model, {type(layer) for layer in model.layers})
    wrapped = [m for m in model.modules() if isinstance(m, CheckpointWrapper)]
    inside = {id(m) for wrapper in wrapped for m in unwrap(wrapper).modules()}
    assert len(wrapped) >= LAYERS
    assert new <= inside
    plain = opened(make(arch, encoder_trainable=True)).eval()
    for one in (model, plain):
        one(text(), encoder_input=inputs()).square().mean().backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    for (name, parameter), gradient in zip(
        get_fusion_params(model).items(), get_fusion_params(plain).values(), strict=True
    ):
        if gradient.grad is not None:
            torch.testing.assert_close(parameter.grad, gradient.grad, rtol=1e-5, atol=1e-6, msg=name)
    assert any(gradient is not None and gradient.any() for gradient in expected.values())


# --- 10 ------------------------------------------------------------------------------------------


@every_arch
def test_defect_10_what_is_frozen_is_written_nowhere(arch, tmp_path):
    model = opened(make(arch))
    assert not any(p.requires_grad for p in model.encoder.parameters())
    save_trained(model, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"fusion.safetensors", "fusion.json"}
    with safe_open(tmp_path / "fusion.safetensors", framework="pt") as reader:
        assert set(reader.keys()) == set(get_fusion_params(model))
        assert not any(name.startswith("encoder") for name in reader.keys())  # noqa: SIM118


@every_arch
def test_defect_10_rows_without_an_image_with_one_and_with_two_are_answered(arch):
    model = opened(make(arch)).eval()
    many = inputs(3, 2 * FEATURES)["x"]
    seen = torch.tensor([[0, 0], [1, 0], [1, 1]]).bool().repeat_interleave(FEATURES, dim=1)
    call = {"max_new_tokens": 5, "temperature": 0}
    said = generate(model, text(3), encoder_input={"x": many}, encoder_mask=seen, **call)
    for row in range(3):
        alone = {"encoder_input": {"x": many[row : row + 1, : row * FEATURES]}} if row else {}
        one = generate(model, text(3)[row : row + 1], **alone, **call)
        assert torch.equal(said[row : row + 1], one), row
        full = model(one[:, :-1], **alone)[:, -1]
        assert torch.equal(full.argmax(-1), one[:, -1]), row
    moved = generate(model, text(3), encoder_input={"x": many * -3}, encoder_mask=seen, **call)
    assert torch.equal(moved[0], said[0])


@every_arch
def test_defect_7_an_artifact_of_another_order_of_modalities_is_refused(arch, tmp_path):
    save_fusion(named(arch), tmp_path)
    other = named(arch, ("ear", "eye"))
    if arch == "cross_attention":  # where nobody stands before another
        assert not any(load_fusion(other, tmp_path))
        return
    with pytest.raises(ValueError, match=r"order \['eye', 'ear'\], the model's is \['ear', 'eye'\]"):
        load_fusion(other, tmp_path)
