from params.models import model_of, named_model
from support import LAYERS, same_state, state, tiny_decoder

from torchfuse.params import partition


def test_every_parameter_is_in_exactly_one_part():
    for model in (model_of(), named_model()):
        groups = partition(model)
        listed = [name for parameters in groups.values() for name in parameters]
        assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    assert list(groups) == ["decoder", "encoder.eye", "encoder.ear", "fusion"]
    assert all(name.startswith("encoders.eye.") for name in groups["encoder.eye"])
    assert {name.split(".")[0] for name in groups["fusion"]} == {"decoder", "adapters"}


def test_a_decoder_alone_is_all_decoder():
    decoder = tiny_decoder()
    assert list(partition(decoder)["decoder"]) == [n for n, _ in decoder.named_parameters()]
    assert same_state(state(decoder), decoder)
    assert len(decoder.layers) == LAYERS
