"""Rows of several documents: each is scored as if it were alone."""

import pytest
import torch
from models.architectures import ARCHS, every_arch, in_place, make, move
from models.test_registered_architecture import GreetingStrategy
from support import FEATURE_DIM, IMAGE, VOCAB, TinyEncoder, tiny_decoder
from torch import nn
from torchtune.training import set_activation_checkpointing

from torchfuse import fuse
from torchfuse.data import MediaInput, image_mask, pack, padded_collate_images
from torchfuse.errors import ModelError
from torchfuse.modules.documents import document_mask, document_positions
from torchfuse.training import next_token_loss

NUM = 2  # features of an image
PACK = 29


class Pixels(nn.Module):
    """Features of images ``[b, m, 2, 5]``, or of a sequence of them, two for each."""

    feature_dim = FEATURE_DIM

    def __init__(self):
        super().__init__()
        self.encoder = TinyEncoder()

    def forward(self, images):
        return self.encoder(images.flatten(1, 2))

    def example_input(self):
        return {"images": torch.zeros(1, 1, 1, 5)}


def layout(name):
    if name == "cross_attention":
        return "marker"
    return "placeholder" if in_place(name) else "prefix"


def document(name, length, images, seed):
    """A document of some images, whose markers or placeholders are spread over it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
    markers = {"marker": 1, "placeholder": NUM, "prefix": 0}[layout(name)]
    for image in range(images):
        at = 1 + 4 * image
        tokens[at : at + markers] = [IMAGE if markers > 1 else VOCAB] * markers
    mask = torch.ones(length, images * NUM, dtype=torch.bool)
    if markers:
        mask = image_mask(
            torch.tensor([tokens]),
            IMAGE if markers > 1 else VOCAB,
            features_per_image=NUM,
            num_images=images,
            markers_per_image=markers,
        )[0]
    labels = [-100 if id >= VOCAB else id for id in tokens]
    pixels = torch.randn(images, NUM, 5, generator=generator)
    return {"tokens": tokens, "labels": labels, "images": pixels, "encoder_mask": mask}


def documents(name, **changed):
    shape = {"one": (9, 1), "none": (7, 0), "two": (11, 2), "more": (6, 1), "last": (13, 2)}
    return {
        key: document(name, *shape[key], seed=changed.get(key, seed)) for seed, key in enumerate(shape)
    }


def packed_model(name, **options):
    if name == "cross_attention":
        options["fusion_vocab_size"] = 1  # the marker
    return make(name, encoder=Pixels(), **options)


def call(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


def packed(name, **changed):
    packs = list(pack(documents(name, **changed).values(), PACK, layout=layout(name)))
    assert 1 < len(packs) < 4
    return padded_collate_images(packs)


def by_document(name, batch, logits):
    """The logits of each document, in the order of ``documents``."""
    found = {}
    for row, ids in enumerate(batch["document_ids"]):
        for index in range(int(ids.max()) + 1):
            own = ids == index
            found[tuple(batch["tokens"][row, own].tolist())] = logits[row, own]
    return {key: found[tuple(d["tokens"])] for key, d in documents(name).items()}


def alone(name, model):
    result = {}
    for key, one in documents(name).items():
        result[key] = model(**call(padded_collate_images([one])))[0]
    return result


@every_arch
def test_documents_of_a_pack_are_scored_as_alone(name):
    model = packed_model(name).eval()
    batch = packed(name)
    together = by_document(name, batch, model(**call(batch)))
    for key, logits in alone(name, model).items():
        torch.testing.assert_close(together[key], logits, rtol=1e-5, atol=1e-5)


@every_arch
def test_loss_and_gradients_are_those_of_padded_rows(name):
    """In evaluation mode for moma, whose experts in training choose among all tokens of a batch."""
    padded = padded_collate_images(list(documents(name).values()))
    length = padded["tokens"].shape[1]
    lengths = torch.tensor([len(one["tokens"]) for one in documents(name).values()])
    ids = (torch.arange(length) < lengths[:, None]).long() - 1  # padding is a document of its own
    gradients = []
    for batch in (packed(name), padded | {"document_ids": ids}):
        model = packed_model(name).eval()
        logits = model(**call(batch))
        total, count = next_token_loss(logits, batch["labels"])
        total.backward()
        gradients.append((total, count, {n: p.grad for n, p in model.named_parameters()}))
    (one, number, grads), (other, as_many, expected) = gradients
    assert number == as_many
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert all(grad is not None for name, grad in expected.items() if "adapter" in name)
    for key, grad in expected.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["tokens", "images"])
@every_arch
def test_a_document_does_not_change_the_others(name, part):
    model = packed_model(name).eval()
    before = by_document(name, packed(name), model(**call(packed(name))))
    for changed in ("one", "two"):
        batch = packed(name)
        other = padded_collate_images(
            list(pack(_exchanged(name, changed, part), PACK, layout=layout(name)))
        )
        after = model(**call(other))
        moved = {
            key: (logits - after[row, at : at + len(logits)]).abs().max()
            for key, (row, at) in _positions(name, batch).items()
            for logits in [before[key]]
        }
        assert moved.pop(changed) > 1e-3
        assert max(moved.values()) < 1e-5


def _exchanged(name, changed, part):
    """The documents, with text or images of one of them exchanged for others."""
    result = documents(name)
    other = documents(name, **{changed: 77})[changed]
    result[changed] = result[changed] | {part: other[part]}
    return result.values()


def _positions(name, batch):
    """Row and first position of each document in a batch of packs."""
    found = {}
    for row, ids in enumerate(batch["document_ids"]):
        for index in range(int(ids.max()) + 1):
            own = (ids == index).nonzero().flatten()
            found[tuple(batch["tokens"][row, own].tolist())] = row, int(own[0])
    return {key: found[tuple(d["tokens"])] for key, d in documents(name).items()}


def test_a_document_without_image_is_scored_as_by_the_decoder():
    model = packed_model("cross_attention")
    batch = packed("cross_attention")
    text = documents("cross_attention")["none"]
    logits = by_document("cross_attention", batch, model(**call(batch)))["none"]
    expected = model(torch.tensor([text["tokens"]]))[0]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cross_attention", "placeholder"])
def test_masks_and_positions_of_documents_may_be_given_instead(name):
    model, batch = packed_model(name).eval(), packed(name)
    expected = model(**call(batch))
    ids = batch.pop("document_ids")
    torch.testing.assert_close(batch["input_pos"], document_positions(ids))
    assert torch.equal(model(**call(batch), mask=document_mask(ids)), expected)
    del batch["input_pos"]
    assert torch.equal(model(**call(batch), document_ids=ids), expected)


@pytest.mark.parametrize("name", ["cross_attention", "prefix", "mot_placeholder", "deepstack"])
def test_checkpointed_activations_change_nothing(name):
    batch, gradients = packed(name), []
    for checkpointed in (False, True):
        model = packed_model(name)
        if checkpointed:
            set_activation_checkpointing(model, {type(layer) for layer in model.layers})
        next_token_loss(model(**call(batch)), batch["labels"])[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["prefix"])
def test_a_pack_compiles_to_one_graph(name):
    model, batch = packed_model(name).eval(), packed(name)
    expected = model(**call(batch))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(**call(batch)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["prefix", "placeholder"])
def test_experts_in_training_choose_among_the_tokens_of_all_documents(layout):
    """The documents of packs are the documents of padded rows, without their padding."""
    name = f"moma_{layout}" if layout == "placeholder" else "moma"
    padded = padded_collate_images(list(documents(name).values()), padding_idx=0)
    outs = []
    for batch in (packed(name), padded):
        model = packed_model(name, noise=False, pad_id=0).train()
        outs.append(next_token_loss(model(**call(batch)), batch["labels"])[0])
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["cross_attention", "mot", "mot_placeholder"])
def test_each_document_has_images_of_several_encoders(arch):
    options = {"encoder_token": {"eye": IMAGE, "ear": IMAGE + 1}} if in_place(arch) else {}
    options = {**ARCHS[arch], **options}
    model = move(fuse(tiny_decoder(), {"eye": TinyEncoder(), "ear": TinyEncoder(seed=6)}, **options))
    samples = [_two_encoders(arch, *which, seed) for seed, which in enumerate(((2, 1), (0, 3), (1, 0)))]
    batch = padded_collate_images(list(pack(samples, 53, layout=layout(arch))))
    together = model.eval()(**call(batch))[0]
    for index, sample in enumerate(samples):
        alone = model(**call(padded_collate_images([sample])))[0]
        own = batch["document_ids"][0] == index
        torch.testing.assert_close(together[own], alone, rtol=1e-5, atol=1e-5)


def _two_encoders(arch, eyes, ears, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB, (11,), generator=generator)
    if in_place(arch):
        tokens[1 : 1 + eyes], tokens[5 : 5 + ears] = IMAGE, IMAGE + 1
    counts = {"eye": eyes, "ear": ears}
    return {
        "tokens": tokens,
        "images": {
            key: [MediaInput(torch.randn(1, 5, generator=generator), "x") for _ in range(num)]
            for key, num in counts.items()
        },
        "encoder_mask": {key: torch.ones(11, num).bool() for key, num in counts.items()},
    }


def test_a_row_of_documents_may_be_longer_than_the_longest_document():
    longest = PACK - 2
    model = packed_model("prefix", decoder=tiny_decoder(max_seq_len=longest)).eval()
    batch = packed("prefix")
    features = batch["encoder_mask"].shape[-1]
    assert batch["tokens"].shape[1] + features > longest
    assert model(**call(batch)).isfinite().all()
    with pytest.raises(ModelError, match=r"text and features is \d+ tokens long"):
        model(batch["tokens"], encoder_input=batch["encoder_input"])


def test_arguments_that_do_not_fit_documents():
    model, batch = packed_model("cross_attention"), call(packed("cross_attention"))
    with pytest.raises(
        ModelError, match=r"integers \[2, 29\] as the tokens are, got torch.float32 \[2, 3"
    ):
        model(**batch | {"document_ids": torch.zeros(2, 3)})
    with pytest.raises(ModelError, match="they take the place of mask, so give one of them"):
        model(**batch, mask=torch.ones(2, PACK, PACK).bool())
    for name in ("cross_attention", "prefix"):
        one, given = packed_model(name), call(packed(name))
        for mask in (None, given["encoder_mask"].any(dim=1)):
            with pytest.raises(ModelError, match=r"encoder_mask of 'encoder' must be \[b, s, n\].*Got"):
                one(**given | {"encoder_mask": mask})
    model.eval().setup_caches(2, torch.float32, encoder_max_seq_len=9, decoder_max_seq_len=PACK)
    with pytest.raises(ModelError, match="caches hold one document a row: delete them"):
        model(**batch)
    greeting = fuse(tiny_decoder(), Pixels(), arch=GreetingStrategy())
    with pytest.raises(
        ModelError, match="GreetingStrategy has takes_documents=False: its rows hold one"
    ):
        greeting(**batch)
