import pytest
import torch
from support import text
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from torchfuse import DeepFusionModel, EarlyFusionModel, describe
from torchfuse.models.builders import digits, llama3_2_1b_clip_vit_l_14_336


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_true_sizes_on_the_meta_device():
    with torch.device("meta"):
        model = llama3_2_1b_clip_vit_l_14_336(fusion_vocab_size=1)
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128_256,
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=16,
                num_attention_heads=32,
                num_key_value_heads=8,
                tie_word_embeddings=True,
            )
        )
        clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
            )
        )
        features = model.encode({"images": torch.zeros(1, 2, 3, 336, 336)})
    table = describe(model)
    assert table["decoder"].parameters == count(llama)
    assert table["encoder"].parameters == count(clip)
    assert table["decoder"].trainable == table["encoder"].trainable == 0
    assert isinstance(model, DeepFusionModel)
    assert [i for i, layer in enumerate(model.layers) if hasattr(layer, "fusion_layer")] == [
        3,
        7,
        11,
        15,
    ]
    assert features.shape == (1, 1152, 2048)


def test_true_sizes_as_a_joint_decoder():
    with torch.device("meta"):
        model = llama3_2_1b_clip_vit_l_14_336(arch="joint_decoder", encoder_token=128_256)
    assert isinstance(model, EarlyFusionModel)
    assert describe(model)["fusion"].parameters == 1024 * 2048 + 2048 + 2048 * 2048 + 2048


@pytest.mark.parametrize("options", [{}, {"arch": "joint_decoder", "encoder_token": 40}])
def test_the_demo_pair(options):
    model = digits(**options)
    assert model(text()).shape == (2, 13, 40)
    assert model.encoder.num_tokens == 5
    with pytest.raises(ValueError, match="unknown option 'evry'"):
        digits(evry=1)
