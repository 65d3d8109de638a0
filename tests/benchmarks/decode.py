"""Decoding with an image against torchtune's cached loop and transformers' ``generate``, in one run.

All have the same weights, of a random Llama 3.2 Vision: transformers' is saved and read again, torchtune's
decoder takes the same state dict around the same tower. Every answer is greedy. A call for one token is
the time of the prompt (the image is encoded in it, caches are made); what a call for more takes beyond
that is the time of the steps. Contestants take turns within each round, so that whatever else the machine
does hits all alike; ratios are taken round by round.

"Of the bandwidth" is the bytes that a step must read (weights of the decoder, each once, and the keys and
values of every slot) times steps per second, over what the machine reads per second in this very run.
Memory is the weights plus what a call allocates at its most.

Run: python tests/benchmarks/decode.py [--size 27M 200M] [--dtype fp32 bf16] [--rows 1 8] [--rounds 5]
On a GPU: python tests/benchmarks/decode.py --device cuda --size 11B --dtype bf16 --tiles 1 4
"""

from __future__ import annotations

import argparse
import copy
import platform
import re
import statistics
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from torchfuse import from_pretrained, generate, quantize

PROFILE_HINT = "--profile prints where the compiled steps spend their time"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What is asked of compiled (or quantized) decoding, times the better of the two peers.
ASKED = {
    ("27M", "fp32", "compiled"): 1.4,
    ("27M", "bf16", "compiled"): 1.5,
    ("200M", "fp32", "compiled"): 1.0,
    ("200M", "bf16", "compiled"): 1.0,
    ("200M", "bf16", "quantized"): 1.2,
}
ASKED_OF_BATCH = 3.0
ASKED_OF_GPU = {"bandwidth": 0.75, "torchtune": 3.0, "transformers": 2.0}
SMALL_TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "image_size": 112}
SIZES = {
    "tiny": ({"width": 48, "heads": 6, "kv": 2, "hidden": 96, "layers": 4, "every": 2, "vocab": 97}),
    "27M": {"width": 512, "heads": 8, "kv": 4, "hidden": 1376, "layers": 5, "every": 5, "vocab": 8192},
    "200M": {"width": 1024, "heads": 16, "kv": 8, "hidden": 2816, "layers": 12, "every": 6, "vocab": 16384},
    "11B": {"width": 4096, "heads": 32, "kv": 8, "hidden": 14336, "layers": 32, "every": 4, "vocab": 128256},
}  # fmt: skip


def their_config(options, size):
    """transformers' configuration; ``layers`` are those of the language model, fused ones come on top."""
    from transformers import MllamaConfig

    shape = SIZES[size]
    fused = shape["layers"] // shape["every"]
    # transformers counts cross-attention layers as layers of their own, in front of those they feed.
    crossing = [index * (shape["every"] + 1) + shape["every"] - 1 for index in range(fused)]
    text = {
        "vocab_size": shape["vocab"],
        "hidden_size": shape["width"],
        "intermediate_size": shape["hidden"],
        "num_hidden_layers": shape["layers"] + fused,
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv"],
        "cross_attention_layers": crossing,
        "max_position_embeddings": 131_072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    vision = {"max_num_tiles": max(options.tiles)}
    if size != "11B":
        vision |= SMALL_TOWER | {
            "num_global_layers": 1,
            "attention_heads": 4,
            "patch_size": 14,
            "intermediate_layers_indices": [1, 3],
            "vision_output_dim": 3 * SMALL_TOWER["hidden_size"],
            "supported_aspect_ratios": [[1, tiles] for tiles in range(1, max(options.tiles) + 1)],
        }
    return MllamaConfig(text_config=text, vision_config=vision, image_token_index=shape["vocab"])


def build(options, size, dtype, folder):
    """The three models, on the same weights."""
    from transformers import MllamaForConditionalGeneration

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(options.device):
            theirs = MllamaForConditionalGeneration(their_config(options, size)).eval()
        for name, parameter in theirs.named_parameters():
            if name.endswith("gate") or "gate_" in name.rpartition(".")[2]:
                parameter.data.fill_(0.5)  # the image shall matter
        theirs.save_pretrained(folder)
        ours = from_pretrained(folder, dtype=dtype, device=options.device).eval()
        tunes = torchtunes(options, SIZES[size], ours)
    finally:
        torch.set_default_dtype(before)
    return theirs, tunes, ours


def torchtunes(options, shape, ours):
    """torchtune's model with the weights of ours, around the same tower."""
    from torchtune.models.llama3_2_vision import llama3_2_vision_decoder
    from torchtune.modules import model_fusion

    table = ours.tok_embeddings
    with torch.device("meta"):
        decoder = llama3_2_vision_decoder(
            vocab_size=shape["vocab"],
            num_layers=shape["layers"],
            fusion_interval=shape["every"],
            num_special_tokens=table.fusion_embedding.num_embeddings,
            num_heads=shape["heads"],
            num_kv_heads=shape["kv"],
            embed_dim=shape["width"],
            max_seq_len=options.prompt + options.new,
            encoder_max_seq_len=1,
            intermediate_dim=shape["hidden"],
        )
    decoder.load_state_dict(ours.decoder.state_dict(), strict=True, assign=True)
    device = torch.device(options.device)
    for layer in decoder.layers:  # tables that are in no state dict
        rope = getattr(getattr(layer, "layer", layer).attn, "pos_embeddings", None)
        if rope is not None:
            rope.to_empty(device=device)
            with device:
                rope.rope_init()
    return model_fusion.DeepFusionModel(decoder, ours.encoder).eval()


def question(options, size, rows, tiles):
    """Text and one image for each row, as transformers' processor would make them."""
    generator = torch.Generator().manual_seed(1)
    shape = SIZES[size]
    tokens = torch.randint(3, shape["vocab"], (rows, options.prompt), generator=generator)
    tokens[:, 0], tokens[:, 1] = 1, shape["vocab"]  # the image's token
    edge = 560 if size == "11B" else SMALL_TOWER["image_size"]
    dtype = DTYPES[options.now]
    pixels = torch.randn(rows, 1, tiles, 3, edge, edge, generator=generator).to(dtype)
    crossing = torch.zeros(rows, options.prompt, 1, tiles, dtype=torch.long)
    crossing[:, 1:] = 1
    device = options.device
    return tokens.to(device), pixels.to(device), crossing.to(device)


class Theirs:
    """transformers' ``generate``."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.name = f"transformers {cache}"

    def __call__(self, asked, new):
        tokens, pixels, crossing = asked
        rows, tiles = pixels.shape[0], pixels.shape[2]
        answer = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=pixels,
            aspect_ratio_ids=torch.full((rows, 1), tiles, device=tokens.device),
            aspect_ratio_mask=torch.ones(rows, 1, tiles, dtype=torch.long, device=tokens.device),
            cross_attention_mask=crossing,
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            cache_implementation=self.cache,
        )
        return answer[:, tokens.shape[1] :]


def seen(crossing, features):
    """``[b, s, n]`` from ``[b, s, images, tiles]``."""
    return crossing.bool().flatten(2).repeat_interleave(features // crossing.shape[3], dim=2)


def images_of(asked):
    _, pixels, _ = asked
    shape = torch.tensor([[[1, pixels.shape[2]]]], device=pixels.device).expand(pixels.shape[0], 1, 2)
    return {"images": pixels, "aspect_ratio": shape}


class Torchtunes:
    """The loop of torchtune's recipe for multimodal generation: caches, causal masks, a token a step."""

    name = "torchtune cached"

    def __init__(self, model):
        self.model = model

    @torch.inference_mode()
    def __call__(self, asked, new):
        from torchtune.modules.common_utils import delete_kv_caches

        tokens, pixels, crossing = asked
        model, length = self.model, tokens.shape[1]
        total = length + new
        embeds = model.encoder(**images_of(asked))
        with tokens.device:
            model.setup_caches(
                tokens.shape[0],
                pixels.dtype,
                encoder_max_seq_len=embeds.shape[1],
                decoder_max_seq_len=total,
            )
            causal = torch.ones(total, total, dtype=torch.bool).tril()[None]
            positions = torch.arange(total)[None]
        mask = seen(crossing, embeds.shape[1])
        logits = model.decoder(
            tokens,
            mask=causal[:, :length].expand(tokens.shape[0], -1, -1),
            encoder_input=embeds,
            encoder_mask=mask,
            input_pos=positions[:, :length],
        )
        answer = [logits[:, -1:].argmax(-1)]
        for position in range(length, total - 1):
            logits = model.decoder(
                answer[-1],
                mask=causal[:, position, None].expand(tokens.shape[0], -1, -1),
                encoder_mask=mask[:, -1:],
                input_pos=positions[:, position, None],
            )
            answer.append(logits[:, -1:].argmax(-1))
        delete_kv_caches(model)
        return torch.cat(answer, dim=1)


class Ours:
    """``torchfuse.generate``."""

    def __init__(self, model, name, *, compile=False):
        self.model, self.name, self.compile = model, name, compile

    def __call__(self, asked, new):
        tokens, _, crossing = asked
        embeds = self.model.encode(images_of(asked))
        sequence = generate(
            self.model,
            tokens,
            encoder_embeds=embeds,
            encoder_mask=seen(crossing, embeds.shape[1]),
            max_new_tokens=new,
            temperature=0,
            compile=self.compile,
        )
        return sequence[:, tokens.shape[1] :]


def synchronize(options):
    if options.device == "cuda":
        torch.cuda.synchronize()


def seconds(options, contestant, asked, new):
    synchronize(options)
    start = time.perf_counter()
    contestant(asked, new)
    synchronize(options)
    return time.perf_counter() - start


def bandwidth(options):
    """Bytes that the machine reads per second: the best of summing and of copying, of eight rounds."""
    gigabyte = torch.ones(1 << 28, device=options.device)
    best = 0.0
    target = torch.empty_like(gigabyte)
    for _ in range(8):
        for work, moved in ((gigabyte.sum, 1), (lambda: target.copy_(gigabyte), 2)):
            synchronize(options)
            start = time.perf_counter()
            work()
            synchronize(options)
            best = max(best, moved * gigabyte.nbytes / (time.perf_counter() - start))
    return best


def stored(tensor):
    """Bytes that a tensor is made of, quantized ones too."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return sum(stored(part) for part in parts)


def bytes_of_step(model, rows, slots, features, dtype):
    """What a step must read: all of the decoder but its table and the maps that only a prompt runs."""
    skipped = ("tok_embeddings", "fusion_layer.attn.k_proj", "fusion_layer.attn.v_proj")
    weights = sum(stored(p) for n, p in model.decoder.named_parameters() if not any(s in n for s in skipped))
    kept = 0
    for layer in model.layers:
        fused = getattr(layer, "fusion_layer", None)
        kept += 2 * slots * layer.attn.num_kv_heads * layer.attn.head_dim
        if fused is not None:
            kept += 2 * features * fused.attn.num_kv_heads * fused.attn.head_dim
    return weights + rows * kept * dtype.itemsize


def memory(options, contestant, asked):
    """Bytes that a call holds at its most over what there was before; None where nothing says."""
    if options.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contestant(asked, options.new)
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    if not status.exists():
        contestant(asked, options.new)
        return None

    def anonymous():
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1])

    before = peak = anonymous()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        contestant(asked, options.new)
    finally:
        done.set()
        watcher.join()
    return max(peak, anonymous()) - before


def spread(values, digits=2):
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f} .. {max(values):.{digits}f}]"


def contestants(options, theirs, tunes, ours):
    """Everybody, peers first; a peer that cannot run here is told of and left out."""
    entered = [Theirs(theirs, cache) for cache in ("dynamic", "static")] + [Torchtunes(tunes)]
    entered += [Ours(ours, "torchfuse eager"), Ours(ours, "torchfuse compiled", compile=True)]
    for scheme in options.quantized:
        smaller = copy.deepcopy(ours).requires_grad_(False)
        quantize(smaller, scheme, fusion=True)
        entered.append(Ours(smaller, f"torchfuse {scheme}, compiled", compile=True))
    return entered


def race(options, size, rows, tiles, entered, read):
    """Print one table, and return tokens per second of every round, by contestant."""
    asked = question(options, size, rows, tiles)
    dtype = DTYPES[options.now]
    said, most = {}, {}
    for contestant in entered:  # compiles what there is to compile
        contestant(asked, 1)
        said[contestant.name] = contestant(asked, options.new)
        most[contestant.name] = memory(options, contestant, asked)
    first = {contestant.name: [] for contestant in entered}
    rate = {contestant.name: [] for contestant in entered}
    for turn in tqdm(range(options.rounds), desc=f"{size} {options.now} {rows}", disable=None, leave=False):
        for contestant in entered if turn % 2 == 0 else reversed(entered):
            one = seconds(options, contestant, asked, 1)
            whole = seconds(options, contestant, asked, options.new)
            first[contestant.name].append(one)
            rate[contestant.name].append(rows * (options.new - 1) / (whole - one))
    features = ours_features(entered[-1].model, asked)
    print(f"\n{size}, {options.now}, {rows} row{'s' * (rows > 1)}, {features} encoder tokens")
    print(
        f"{'':<38} {'prompt, ms':<24} {'tokens/s':<27} {'of the bandwidth':<17} {'memory, MB':<11} "
        "same tokens"
    )
    slots = options.prompt + options.new
    for contestant in entered:
        name = contestant.name
        model = contestant.model
        line = f"{name:<38} {spread([1e3 * s for s in first[name]], 0):<24} {spread(rate[name], 1):<27} "
        weights = sum(stored(tensor) for tensor in {id(p): p for p in model.parameters()}.values())
        sized = model if isinstance(contestant, Ours) else next(c.model for c in entered if isinstance(c, Ours))
        needed = bytes_of_step(sized, rows, slots, features, dtype)
        line += f"{statistics.median(rate[name]) / rows * needed / read:<17.0%} "
        held = "" if most[name] is None else f"{(weights + most[name]) / 1e6:,.0f}"
        same = (said[name] == said["torchfuse eager"]).float().mean()
        print(f"{line}{held:<11} {same:.0%}")
    return rate


@torch.no_grad()
def ours_features(model, asked):
    return model.encode(images_of(asked)).shape[1]


def verdicts(options, size, rate):
    """Print the ratios that are asked for, of one row, and return them."""
    peers = [name for name in rate if not name.startswith("torchfuse")]
    better = max(peers, key=lambda name: statistics.median(rate[name]))
    quantized = [name for name in rate if name.endswith(", compiled")]
    found = {"compiled": "torchfuse compiled"}
    if quantized:
        found["quantized"] = max(quantized, key=lambda name: statistics.median(rate[name]))
    ratios = {}
    for what, name in found.items():
        ratio = [mine / other for mine, other in zip(rate[name], rate[better], strict=True)]
        ratios[size, options.now, what] = statistics.median(ratio)
        asked = ASKED.get((size, options.now, what))
        goal = "" if asked is None else f", asked {asked}: " + verdict(statistics.median(ratio), asked)
        print(f"{name} / {better}: {spread(ratio)}{goal}")
    return ratios


def verdict(ratio, asked):
    return "reached" if ratio >= asked else "MISSED"


def profile(options, entered, size):
    """Where the steps of the compiled model spend their time."""
    asked = question(options, size, 1, options.tiles[0])
    contestant = next(c for c in entered if c.name == "torchfuse compiled")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if options.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        contestant(asked, options.new)
    print(profiler.key_averages().table(sort_by=f"self_{options.device}_time_total", row_limit=12))


def compete(options, size, folder):
    """All of one size and dtype: one row, several rows, and what is asked of them."""
    from transformers import logging

    logging.disable_progress_bar()
    models = build(options, size, DTYPES[options.now], folder)
    read = bandwidth(options)
    parameters = sum(p.numel() for p in models[2].parameters())
    print(f"\n{parameters / 1e6:,.1f} M parameters; this machine reads {read / 1e9:.1f} GB/s")
    entered = contestants(options, *models)
    ratios = {}
    for tiles in options.tiles:
        rates = {rows: race(options, size, rows, tiles, entered, read) for rows in options.rows}
        fewest, most = min(rates), max(rates)
        ratios |= verdicts(options, size, rates[fewest])
        if most > fewest:
            name = "torchfuse compiled"
            gain = [a / b for a, b in zip(rates[most][name], rates[fewest][name], strict=True)]
            ratios[size, options.now, "batch"] = statistics.median(gain)
            goal = f", asked {ASKED_OF_BATCH}: {verdict(statistics.median(gain), ASKED_OF_BATCH)}"
            print(f"{name}, {most} rows / {fewest}: {spread(gain)}{goal if most == 8 else ''}")
    if options.profile:
        profile(options, entered, size)
    return ratios


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["27M", "200M"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tiles", nargs="+", type=int, default=[1], help="of each image")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantized", nargs="*", default=["int8_weight_only", "int8_dynamic"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(argv)
    import torchtune
    import transformers

    torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {where}")
    print(f"prompt {options.prompt}, {options.new} new tokens, median of {options.rounds} rounds and")
    print(f"[least .. most]; {options.threads} threads; {PROFILE_HINT}")
    if options.device == "cpu":
        print("figures of a GPU are not measured")
    ratios = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size in options.size:
            for options.now in options.dtype:
                with tempfile.TemporaryDirectory() as folder:
                    ratios |= compete(options, size, Path(folder))
                torch._dynamo.reset()
    return ratios


if __name__ == "__main__":
    main()
