import pytest
import torch
from benchmarks.bandwidth import step_bytes
from prompt_settings import images, make_settings, model_for
from support import tiny_decoder

from torchfuse import quantize
from torchfuse.params import storage_nbytes
from torchfuse.tasks.conversation import Conversation
from torchfuse.tasks.prompts import user_message


@pytest.mark.parametrize("layout", ["all", "placeholder"])
@pytest.mark.parametrize("with_image", [True, False], ids=["images", "text"])
def test_bytes_of_a_step_are_those_of_the_modules_that_run(tmp_path, layout, with_image):
    """Counted independently: parameters of modules that a step runs, by forward hooks, and all caches."""
    model, settings = model_for(layout), make_settings(tmp_path, layout)
    ran, counting = set(), []
    for module in model.modules():
        own = {id(p): p for p in module.parameters(recurse=False)}
        if own:
            module.register_forward_hook(lambda *_, own=own: ran.update(own) if counting else None)
    model.layers[-1].register_forward_hook(lambda *_: counting.append(1))  # skips the prompt
    everything = {id(p): p for p in model.parameters()}
    table = {id(p) for p in model.tok_embeddings.parameters()}
    picture = images(tmp_path)["a"]
    with Conversation(model, settings, max_tokens=40, max_images=3) as conversation:
        conversation.ask(user_message("w4 w5", (picture,) if with_image else ()))
        caches = [m for m in model.modules() if hasattr(m, "k_cache") and getattr(m, "is_filled", True)]
        expected = sum(m.k_cache.nbytes + m.v_cache.nbytes for m in caches)
        expected += sum(everything[i].nbytes for i in ran if i not in table)
        assert len(caches) == 3 + (layout == "all" and with_image)
        assert step_bytes(model) == expected


def test_a_tied_head_reads_the_table():
    free, tied = tiny_decoder(), tiny_decoder(tied=True)
    table = free.tok_embeddings.weight.nbytes
    assert step_bytes(free) == sum(p.nbytes for p in free.parameters()) - table
    assert step_bytes(tied) == sum(p.nbytes for p in tied.parameters())


def test_quantized_weights_count_as_they_are_stored():
    model = model_for("all")
    before = step_bytes(model)
    done = quantize(model, "int8_weight_only")
    assert step_bytes(model) == before - done.bytes_before + done.bytes_after
    assert storage_nbytes(torch.zeros(3, 5)) == 60
